"""Arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="Base model: a folder, a hub name or a .gguf file.")]
Adapter = Annotated[Path, typer.Option(help="PEFT adapter folder.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples in a batch.")]
Device = Annotated[str, typer.Option(help="Such as cpu or cuda; auto takes a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="Of the base model: auto, float32, bfloat16 or float16.")]
Posterior = Annotated[Path, typer.Option(help="Folder written by `fit`.")]
TestRows = Annotated[Path, typer.Option(help='Test rows, JSON lines: {"prompt", "choices", "label"}.')]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures here.")]
Truncate = Annotated[
    bool,
    typer.Option("--truncate", help="Cut prompts that are too long for the model, from the left."),
]
LinkApprox = Annotated[
    str, typer.Option(help="probit, mc or bridge; map is the plain adapter without Laplace.")
]
