"""The command line: `laplace-lora demo | fit | evaluate | predict | doctor`."""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

from laplace_lora_fast import cli_checks as checks

INSTALL = 'pip install "laplace-lora-fast[{0}]", or in a checkout: pip install ".[{0}]"'
try:
    import typer
    from rich.console import Console
    from rich.markup import escape
except ImportError as error:
    raise SystemExit(f"{error}: {INSTALL.format('cli,evaluate')}") from error

# Heavy imports stand inside the commands: `--help` and typing errors answer at once.

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Calibrated probabilities from a LoRA adapter."
)
console = Console()
errors = Console(stderr=True, highlight=False)

Command = TypeVar("Command", bound=Callable[..., None])

Model = Annotated[str, typer.Option(help="Base model: a folder, a hub name or a .gguf file.")]
Adapter = Annotated[Path, typer.Option(help="PEFT adapter folder.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples in a batch.")]
Device = Annotated[str, typer.Option(help="Such as cpu or cuda; auto takes a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="Of the base model: auto, float32, bfloat16 or float16.")]
Posterior = Annotated[Path, typer.Option(help="Folder written by `fit`.")]
LinkApprox = Annotated[
    str, typer.Option(help="probit, mc or bridge; map is the plain adapter without Laplace.")
]


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
                if (getattr(error, "name", None) or "").split(".")[0] in (
                    "torchmetrics",
                    "matplotlib",
                    "gguf",
                ):
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


@app.command()
@_friendly
def fit(
    model: Model,
    adapter: Adapter,
    data: Annotated[Path, typer.Option(help='Training rows, JSON lines: {"prompt", "choices", "label"}.')],
    out: Annotated[Path, typer.Option(help="Folder for the posterior.")] = Path("posterior"),
    val: Annotated[Path | None, typer.Option(help="Held-out rows, for --prior val_nll.")] = None,
    prior: Annotated[
        str | None,
        typer.Option(
            help="val_nll (on --val), loo (leaves out one training row at a time; needs --mean refit), marglik (the "
            "evidence: a poor guide on an over-trained adapter), or a number. Default: val_nll with --val, else loo "
            "where --mean can be refit, else marglik."
        ),
    ] = None,
    prior_structure: Annotated[
        str, typer.Option(help="scalar, ab (not with loo) or layerwise (only with marglik).")
    ] = "scalar",
    grid: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW HIGH",
            help="Prior precisions that val_nll and loo try, 10 a decade; else 1e-4 to 1e6.",
        ),
    ] = None,
    structure: Annotated[
        str, typer.Option(help="Of the curvature: kfac, ekfac, dual, diag or auto.")
    ] = "auto",
    mean: Annotated[
        str | None,
        typer.Option(
            help="map: the adapter's own predictions stay in the centre. refit: the linearised model's own optimum "
            "under the prior, which moves them. Default: map; refit if neither --val nor --prior is given and the "
            "options allow it: --structure auto or dual, --fisher exact, and no more than "
            f"{checks.MOST_REFIT_ROWS} rows x (choices - 1)."
        ),
    ] = None,
    kfac: Annotated[str | None, typer.Option(help="reduce, expand or paper.")] = None,
    fisher: Annotated[str, typer.Option(help="exact, mc or empirical.")] = "exact",
    factor: Annotated[str, typer.Option(help="dense, sketch or auto.")] = "auto",
    rank: Annotated[int | None, typer.Option(min=1, help="Eigenpairs kept of each large factor.")] = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: int = 0,
) -> None:
    """Fit the posterior of an adapter on its training rows and tune the prior precision."""
    from laplace_lora_fast import LaplaceLoRA
    from laplace_lora_fast.prompts import answer_token_ids, make_batches, read_rows

    rows = read_rows(data)
    val_rows = None if val is None else read_rows(val)
    exact = (
        structure in ("auto", "dual") and fisher == "exact" and (kfac, factor, rank) == (None, "auto", None)
    )
    few = len(rows) * (len(rows[0].choices) - 1) <= checks.MOST_REFIT_ROWS
    may_refit = exact and few and prior_structure == "scalar"
    prior, mean = checks.prior_and_mean(prior, mean, val is not None, may_refit)
    precision = checks.fixed_precision(prior)
    checks.check_prior(prior, mean, prior_structure, val is not None)
    tried = checks.spread(grid, prior)
    peft_model, tokenizer = _load(model, adapter, device, dtype)
    answers = answer_token_ids(tokenizer, rows)
    val_loader = None
    if val_rows is not None:
        _same_answers(answer_token_ids(tokenizer, val_rows), answers, val)
        val_loader = make_batches(tokenizer, val_rows, batch_size)
    la = LaplaceLoRA(
        peft_model,
        answer_token_ids=answers,
        structure=structure,
        mean=mean,
        kfac=kfac,
        fisher=fisher,
        factor=factor,
        rank=rank,
        prior_precision=1.0 if precision is None else precision,
        seed=seed,
    )
    checks.make_writable(out)
    la.fit(make_batches(tokenizer, rows, batch_size))
    notes = []
    if precision is None:
        la.optimize_prior_precision(prior, prior_structure=prior_structure, val_loader=val_loader, grid=tried)
        notes = checks.at_the_edge(la.prior_precision, tried, mean) if prior != "marglik" else []
    la.save(out)
    by = f", chosen by {prior}" if precision is None else ""
    evidence = la.log_marginal_likelihood().item()
    for line in (
        f"Fitted on {len(rows)} rows, mean {mean}; prior precision {_show(la.prior_precision)}{by}.",
        *notes,
        f"log marginal likelihood {evidence:.4g}. Written: {escape(str(out))}",
    ):
        console.print(line, soft_wrap=True)


@app.command()
@_friendly
def evaluate(
    model: Model,
    adapter: Adapter,
    data: Annotated[Path, typer.Option(help='Test rows, JSON lines: {"prompt", "choices", "label"}.')],
    posterior: Posterior = Path("posterior"),
    link_approx: LinkApprox = "probit",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the scores here.")] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for a reliability diagram and a histogram.")
    ] = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Compare the plain adapter (MAP) with its Laplace posterior on test rows."""
    from laplace_lora_fast.evaluate import Predictions
    from laplace_lora_fast.prompts import make_batches, read_rows
    from laplace_lora_fast.report import metrics_table, score, write_plots

    checks.check_link(link_approx)
    rows = read_rows(data)
    if json_file is not None:
        checks.make_writable(json_file.parent)
    if plots is not None:
        import laplace_lora_fast.plots  # noqa: F401  it may be missing matplotlib

        checks.make_writable(plots)
    la, tokenizer = _load_posterior(model, adapter, posterior, rows, data, device, dtype)
    loader = make_batches(tokenizer, rows, batch_size)
    predictions = {}
    for method, link in (("MAP", "map"), ("Laplace", link_approx)):
        probs, labels = la.predict_loader(loader, link_approx=link)
        predictions[method] = Predictions(probs, labels)
    grid = {data.stem: predictions}
    scores = score(grid)
    console.print(metrics_table(scores))
    if json_file is not None:
        values = {method: asdict(metrics) for method, metrics in scores[data.stem].items()}
        json_file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
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
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Write each row's probabilities under the posterior: {"prompt", "choices", "probs"}."""
    from laplace_lora_fast.prompts import batch_order, make_batches, read_rows

    checks.check_link(link_approx)
    rows = read_rows(data, labelled=False)
    checks.make_writable(out.parent)
    la, tokenizer = _load_posterior(model, adapter, posterior, rows, data, device, dtype)
    probs, _ = la.predict_loader(make_batches(tokenizer, rows, batch_size), link_approx=link_approx)
    of_row = dict(zip(batch_order(tokenizer, rows), probs.tolist(), strict=True))
    with out.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            line = {"prompt": row.prompt, "choices": row.choices, "probs": of_row[number]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    console.print(f"Written: {escape(str(out))}, {len(rows)} rows.")


@app.command()
@_friendly
def doctor() -> None:
    """Print versions, devices, and for each kernel the backend that would serve it, and why."""
    from laplace_lora_fast.doctor import report

    report(console)


def main() -> None:
    """Entry point of `laplace-lora`."""
    if not sys.stderr.isatty():  # the bars of the libraries below too: a log would keep every refresh
        os.environ.setdefault("TQDM_DISABLE", "1")
    app()


def _load(source: str, adapter: Path, device: str, dtype: str) -> tuple[Any, Any]:
    """Base model with adapter, and tokenizer."""
    import torch
    from peft import PeftModel

    from laplace_lora_fast.prompts import load_causal_lm

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} holds no adapter_config.json: pass a PEFT adapter folder")
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {where} cannot be used: {checks.one_line(error)}") from error
    try:
        base, tokenizer = load_causal_lm(source, where, "auto" if dtype == "auto" else getattr(torch, dtype))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"model {source!r} cannot be loaded on {where}: {checks.one_line(error)}") from error
    try:
        return PeftModel.from_pretrained(base, str(adapter)).eval(), tokenizer
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"adapter {adapter} does not fit model {source!r}: {checks.one_line(error)}"
        ) from error


def _load_posterior(
    source: str, adapter: Path, posterior: Path, rows: Sequence[Any], data: Path, device: str, dtype: str
) -> tuple[Any, Any]:
    """The fitted posterior, for rows with the answers it was fitted on, and the tokenizer."""
    from laplace_lora_fast import LaplaceLoRA
    from laplace_lora_fast.prompts import answer_token_ids

    model, tokenizer = _load(source, adapter, device, dtype)
    la = LaplaceLoRA.load(posterior, model)
    _same_answers(answer_token_ids(tokenizer, rows), la.answer_token_ids, data)
    return la, tokenizer


def _same_answers(found: Sequence[int], expected: Sequence[int] | None, path: Path | None) -> None:
    if expected is None or list(found) != list(expected):
        raise ValueError(
            f"{path}: field 'choices' names other answers, or in another order, than the training rows"
        )


def _show(prior_precision: Any) -> str:
    if isinstance(prior_precision, float):
        return f"{prior_precision:.4g}"
    if len(prior_precision) > 2:
        return f"{min(prior_precision.values()):.4g} to {max(prior_precision.values()):.4g} by layer"
    return ", ".join(f"{key}: {value:.4g}" for key, value in prior_precision.items())


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Warnings of this package in one line; those of the libraries below say nothing a user could act on."""
    from laplace_lora_fast.errors import LaplaceWarning

    if issubclass(category, LaplaceWarning):
        errors.print(f"[yellow]warning:[/yellow] {escape(str(message))}", soft_wrap=True)
