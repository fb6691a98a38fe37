"""The command line: `laplace-lora demo | fit | evaluate | predict | select | generate | plan | doctor`."""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

from laplace_lora_fast.cli import checks, loading

INSTALL = 'pip install "laplace-lora-fast[{0}]", or in a checkout: pip install ".[{0}]"'
try:
    import typer
    from rich.console import Console
    from rich.markup import escape

    from laplace_lora_fast.cli.arguments import (
        Adapter,
        BatchSize,
        Device,
        Dtype,
        JsonFile,
        LinkApprox,
        Model,
        Posterior,
        TestRows,
        Truncate,
    )
    from laplace_lora_fast.cli.fit import fit
    from laplace_lora_fast.cli.generate import generate
except ImportError as error:
    raise SystemExit(f"{error}: {INSTALL.format('cli,evaluate')}") from error

# Heavy imports stand inside the commands: `--help` and typing errors answer at once.

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Calibrated probabilities from a LoRA adapter."
)
console = Console()
errors = Console(stderr=True, highlight=False)

Command = TypeVar("Command", bound=Callable[..., None])


def _friendly(command: Command) -> Command:
    """Turns errors about the user's input into one line on stderr and exit code 2, warnings into one line each."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                command(*args, **kwargs)
            except (ValueError, ArithmeticError, OSError, ImportError) as error:
                message = checks.one_line(error)
                if (getattr(error, "name", None) or "").split(".")[0] in ("matplotlib", "gguf"):
                    extras = "demo" if command.__name__ == "demo" else "cli,evaluate"
                    message += f": {INSTALL.format(extras)}"
                errors.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True)
                raise typer.Exit(2) from error

    return guarded  # type: ignore[return-value]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"laplace-lora {version('laplace-lora-fast')}")
        raise typer.Exit


@app.callback()
def _common(
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print it and exit.")
    ] = False,
) -> None: ...


@app.command()
@_friendly
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo-output"),
    seed: Annotated[int, typer.Option(help="Of the split, the adapter and the order of the batches.")] = 0,
) -> None:
    """Over-train an adapter on real data with a real model, and compare MAP with Laplace-LoRA (a few minutes)."""
    from laplace_lora_fast.demo.run import run
    from laplace_lora_fast.demo.task import Recipe

    checks.make_writable(out)
    run(out, Recipe(seed=seed), console)


app.command()(_friendly(fit))


@app.command()
@_friendly
def evaluate(
    model: Model,
    adapter: Adapter,
    data: TestRows,
    posterior: Posterior = Path("posterior"),
    link_approx: LinkApprox = "probit",
    json_file: JsonFile = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", help="Write them here as a table with intervals.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for reliability, confidence and risk-coverage diagrams.")
    ] = None,
    truncate: Truncate = False,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Compare the plain adapter (MAP) with its Laplace posterior on test rows."""
    from laplace_lora_fast.data.prompts import read_rows
    from laplace_lora_fast.evaluation.report import details, markdown, metrics_table, score, write_plots
    from laplace_lora_fast.prediction import MAP_LINK

    checks.check_link(link_approx)
    rows = read_rows(data)
    for option, file in (("--json", json_file), ("--markdown", markdown_file)):
        if file is not None:
            checks.check_output(option, file, checks.inputs_of(model, adapter, data, posterior))
    if plots is not None:
        import laplace_lora_fast.evaluation.plots  # noqa: F401  it may be missing matplotlib

        checks.make_writable(plots)
    la, reader = loading.load_posterior(model, adapter, posterior, device, dtype, batch_size, truncate)
    test = reader.batches(la.task, rows, data)
    methods = {"MAP": MAP_LINK, "Laplace": link_approx}
    grid = {
        data.stem: {
            method: la.predictions(test.batches, link_approx=link) for method, link in methods.items()
        }
    }
    scores = score(grid)
    console.print(metrics_table(scores))
    values = details(grid[data.stem]) if json_file is not None or markdown_file is not None else {}
    if json_file is not None:
        _write(json_file, json.dumps(values, indent=2) + "\n")
    if markdown_file is not None:
        _write(markdown_file, markdown(data.stem, values))
    if plots is not None:
        write_plots(grid, plots)


@app.command()
@_friendly
def predict(
    model: Model,
    adapter: Adapter,
    data: Annotated[Path, typer.Option(help='Rows, JSON lines: {"prompt", "choices"}; labels are not read.')],
    out: Annotated[Path, typer.Option(help="JSON lines with the rows' probabilities, in their order.")],
    posterior: Posterior = Path("posterior"),
    link_approx: LinkApprox = "probit",
    truncate: Truncate = False,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Write each row's probabilities under the posterior: {"prompt", "choices", "probs"}."""
    from laplace_lora_fast.data.prompts import read_rows

    checks.check_link(link_approx)
    rows = read_rows(data, labelled=False)
    checks.check_output("--out", out, checks.inputs_of(model, adapter, data, posterior))
    la, reader = loading.load_posterior(model, adapter, posterior, device, dtype, batch_size, truncate)
    new = reader.batches(la.task, rows, data)
    predictions = la.predictions(new.batches, link_approx=link_approx)
    of_row = dict(zip(new.order, predictions.probs.tolist(), strict=True))
    lines = [
        {"prompt": row.prompt, "choices": row.choices, "probs": of_row[number][: len(row.choices)]}
        for number, row in enumerate(rows)
    ]
    _write(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    console.print(f"Written: {escape(str(out))}, {len(rows)} rows.")


@app.command()
@_friendly
def select(
    model: Model,
    adapter: Adapter,
    data: TestRows,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Rows that neither trained nor tuned anything, for conformal sets of choices."),
    ] = None,
    coverage: Annotated[float, typer.Option(help="Share of rows to answer, the surest.")] = 0.8,
    alpha: Annotated[
        float | None, typer.Option(help="How often a set may miss the label; 0.1. With --calibration.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Of the sets: threshold (default) or adaptive. With --calibration.")
    ] = None,
    posterior: Posterior = Path("posterior"),
    link_approx: LinkApprox = "probit",
    json_file: JsonFile = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON lines: each row, whether it is answered, its set.")
    ] = None,
    truncate: Truncate = False,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Answer the surest rows only, or give sets of choices that hold the label: what risk that leaves."""
    from laplace_lora_fast.cli import selection
    from laplace_lora_fast.data.prompts import read_rows

    checks.check_link(link_approx)
    level, chosen = checks.conformal_options(calibration is not None, coverage, alpha, method)
    rows = read_rows(data)
    calibration_rows = None if calibration is None else read_rows(calibration)
    read = checks.inputs_of(model, adapter, data, posterior, *([] if calibration is None else [calibration]))
    for option, file in (("--json", json_file), ("--out", out)):
        if file is not None:
            checks.check_output(option, file, read)
    la, reader = loading.load_posterior(model, adapter, posterior, device, dtype, batch_size, truncate)
    labelled = {"test": (data, rows)} | (
        {} if calibration is None else {"held": (calibration, calibration_rows)}
    )
    found, lines = selection.select(la, reader, labelled, link_approx, coverage, level, chosen)
    console.print(selection.table(found))
    if json_file is not None:
        _write(json_file, json.dumps(found, indent=2) + "\n")
    if out is not None:
        _write(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


app.command()(_friendly(generate))


@app.command()
@_friendly
def plan(
    config: Annotated[Path, typer.Option(help="config.json of a causal language model, or its folder.")],
    targets: Annotated[str, typer.Option(help="all-linear, or names such as q_proj,v_proj.")] = "all-linear",
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter.")] = 16,
    examples: Annotated[int, typer.Option(min=1, help="Training examples.")] = 1000,
    classes: Annotated[int, typer.Option(min=2, help="Answers to choose from.")] = 2,
    tokens: Annotated[int, typer.Option(min=1, help="Of an example.")] = 256,
    budget: Annotated[float, typer.Option(min=0.001, help="GiB for the posterior on the device.")] = 4.0,
    tflops: Annotated[float, typer.Option(help="Sustained in the passes, 1e12 a second.")] = 300.0,
    tflops_fp64: Annotated[float, typer.Option(help="Sustained in fp64 algebra, 1e12 a second.")] = 10.0,
) -> None:
    """Price the structures for a model from its configuration alone: bytes, seconds, and what to choose."""
    from laplace_lora_fast.cli.plan import Setting, show

    setting = Setting(config, targets, rank, examples, classes, tokens, int(budget * 2**30))
    show(console, setting, tflops, tflops_fp64)


@app.command()
@_friendly
def doctor() -> None:
    """Print versions, devices, and for each kernel the backend that would serve it, and why."""
    from laplace_lora_fast.cli.doctor import report

    report(console)


def main() -> None:
    """Entry point of `laplace-lora`."""
    if not sys.stderr.isatty():  # the bars of the libraries below too: a log would keep every refresh
        os.environ.setdefault("TQDM_DISABLE", "1")
    app()


def _write(path: Path, text: str) -> None:
    from laplace_lora_fast.saving.atomic import replacing

    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Warnings of this package in one line; those of the libraries below say nothing a user could act on."""
    from laplace_lora_fast.errors import LaplaceWarning

    if issubclass(category, LaplaceWarning):
        errors.print(f"[yellow]warning:[/yellow] {escape(str(message))}", soft_wrap=True)
