"""The command `laplace-lora generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from laplace_lora_fast.cli import checks, loading
from laplace_lora_fast.cli.arguments import Adapter, BatchSize, Device, Dtype, Model, Posterior

console = Console()


def generate(
    model: Model,
    adapter: Adapter,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    data: Annotated[Path | None, typer.Option(help='Prompts, JSON lines: {"prompt"}.')] = None,
    posterior: Posterior = Path("posterior"),
    samples: Annotated[
        int, typer.Option(min=1, help="Of the weights, which the answer is a mixture of.")
    ] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 64,
    temperature: Annotated[
        float | None, typer.Option(help="Draw tokens at this temperature; the likeliest are taken without.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="With --temperature: of the likeliest only.")] = None,
    measure: Annotated[
        str, typer.Option(help="What is marked: epistemic, total, aleatoric, epkl, rmi or nll.")
    ] = "epistemic",
    above: Annotated[
        float, typer.Option(min=0.0, help="Mark tokens with more of it than this, in nats.")
    ] = 0.2,
    html: Annotated[Path | None, typer.Option(help="Write a page with the answers in colours.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write JSON lines, every token with its numbers.")] = None,
    batch_size: BatchSize = 4,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: int = 0,
) -> None:
    """Answer prompts, and mark the tokens that the posterior is not sure of."""
    from laplace_lora_fast.cli import answers
    from laplace_lora_fast.saving.atomic import replacing

    prompts = answers.prompts_of(prompt, data)
    answers.check(measure, temperature, top_p)
    read = checks.inputs_of(model, adapter, posterior, *([] if data is None else [data]))
    for option, path in (("--html", html), ("--out", out)):
        if path is not None:
            checks.check_output(option, path, read)
    la, reader = loading.load_posterior(model, adapter, posterior, device, dtype, batch_size, False)
    options: dict[str, Any] = {"n_samples": samples, "max_new_tokens": max_new_tokens, "seed": seed}
    options |= {"do_sample": temperature is not None, "temperature": temperature, "top_p": top_p}
    found = []
    for start in range(0, len(prompts), batch_size):
        found.append(la.generate(prompts[start : start + batch_size], reader.tokenizer, **options))
        answers.show(console, found[-1], measure, above)
    for path, text in ((html, answers.page), (out, answers.json_lines)):
        if path is not None:
            with replacing(path) as partial:
                partial.write_text(text(found, measure), encoding="utf-8")
            console.print(f"Written: {escape(str(path))}, {len(prompts)} answers.")
