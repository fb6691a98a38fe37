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
