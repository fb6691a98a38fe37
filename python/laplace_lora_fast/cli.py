"""The command line: `laplace-lora demo | fit | evaluate | doctor`."""

from __future__ import annotations

import functools
import json
import platform
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, TypeVar

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"{error}: pip install 'laplace-lora-fast[cli,evaluate]'") from error

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


def _friendly(command: Command) -> Command:
    """Turns errors about the user's input into one line on stderr and exit code 2, warnings into one line each."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                command(*args, **kwargs)
            except (ValueError, ArithmeticError, OSError, ImportError) as error:
                errors.print(f"[red]error:[/red] {escape(_one_line(error))}", soft_wrap=True)
                raise typer.Exit(2) from error

    return guarded  # type: ignore[return-value]


@app.command()
@_friendly
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo-output"),
    seed: Annotated[int, typer.Option(help="Of the split, the adapter and the order of the batches.")] = 0,
) -> None:
    """Over-train an adapter on real data with a real model, and compare MAP with Laplace-LoRA (a few minutes)."""
    from laplace_lora_fast.demo.run import run
    from laplace_lora_fast.demo.task import Recipe

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
            help="val_nll, loo, marglik, or a number. Default: val_nll with --val, else loo with --mean refit, else "
            "marglik."
        ),
    ] = None,
    prior_structure: Annotated[str, typer.Option(help="scalar, ab or (marglik only) layerwise.")] = "scalar",
    structure: Annotated[
        str, typer.Option(help="Of the curvature: kfac, ekfac, dual, diag or auto.")
    ] = "auto",
    mean: Annotated[
        str, typer.Option(help="map, or refit: the linearised model's own optimum under the prior.")
    ] = "map",
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

    unheld = "loo" if mean == "refit" else "marglik"
    method = prior or (unheld if val is None else "val_nll")
    precision = _number(method)
    if precision is None and method not in ("val_nll", "loo", "marglik"):
        raise ValueError(f"--prior must be val_nll, loo, marglik or a number, got {method!r}")
    if (method == "val_nll") != (val is not None):
        raise ValueError("--prior val_nll and --val need each other")
    rows = read_rows(data)
    val_rows = None if val is None else read_rows(val)
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
        prior_precision=precision or 1.0,
        seed=seed,
    )
    la.fit(make_batches(tokenizer, rows, batch_size))
    if precision is None:
        la.optimize_prior_precision(method, prior_structure=prior_structure, val_loader=val_loader)
    la.save(out)
    console.print(f"Fitted on {len(rows)} rows; prior precision {_show(la.prior_precision)} ({method}).")
    console.print(
        f"log marginal likelihood {la.log_marginal_likelihood().item():.4g}. Written: {escape(str(out))}"
    )


@app.command()
@_friendly
def evaluate(
    model: Model,
    adapter: Adapter,
    data: Annotated[Path, typer.Option(help='Test rows, JSON lines: {"prompt", "choices", "label"}.')],
    posterior: Annotated[Path, typer.Option(help="Folder written by `fit`.")] = Path("posterior"),
    link_approx: Annotated[str, typer.Option(help="probit, mc or bridge.")] = "probit",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the scores here.")] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for a reliability diagram and a histogram.")
    ] = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Compare the plain adapter (MAP) with its Laplace posterior on test rows."""
    from laplace_lora_fast import LaplaceLoRA
    from laplace_lora_fast.evaluate import Predictions
    from laplace_lora_fast.prompts import answer_token_ids, make_batches, read_rows
    from laplace_lora_fast.report import metrics_table, score, write_plots

    rows = read_rows(data)
    peft_model, tokenizer = _load(model, adapter, device, dtype)
    la = LaplaceLoRA.load(posterior, peft_model)
    _same_answers(answer_token_ids(tokenizer, rows), la.answer_token_ids, data)
    loader = make_batches(tokenizer, rows, batch_size)
    predictions = {}
    for method, link in (("MAP", "map"), ("Laplace", link_approx)):
        probs, labels = la.predict_loader(loader, link_approx=link)
        predictions[method] = Predictions(probs, labels)  # type: ignore[arg-type]
    grid = {data.stem: predictions}
    scores = score(grid)
    console.print(metrics_table(scores))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        values = {method: asdict(metrics) for method, metrics in scores[data.stem].items()}
        json_file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if plots is not None:
        write_plots(grid, plots)


@app.command()
@_friendly
def doctor() -> None:
    """Print versions, devices, and for each kernel the backend that would serve it, and why."""
    import torch

    from laplace_kernels import OPS, explain

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    versions = Table(title="Versions", show_header=False)
    versions.add_row("python", platform.python_version())
    for package in ("laplace-lora-fast", "torch", "triton", "peft", "transformers", "torchmetrics"):
        # torch's own version names its build, its metadata's need not
        versions.add_row(package, torch.__version__ if package == "torch" else _version(package))
    console.print(versions)
    names = Table(title="Devices", show_header=False)
    for device in devices:
        names.add_row(str(device), _describe(device))
    console.print(names)
    table = Table(title="Kernels")
    for heading in ("op", "device", "inputs", "backend", "why", "passed over"):
        table.add_column(heading, no_wrap=heading in ("op", "backend"))
    for device in devices:
        for op in OPS:
            for dtypes, choice in _choices(explain, op, device):
                others = "; ".join(f"{name}: {reason}" for name, reason in choice.others.items())
                table.add_row(op, str(device), dtypes, choice.backend, choice.reason, others)
        table.add_section()
    console.print(table)


def main() -> None:
    """Entry point of `laplace-lora`."""
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
        base, tokenizer = load_causal_lm(source, where, "auto" if dtype == "auto" else getattr(torch, dtype))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"model {source!r} cannot be loaded on {where}: {_one_line(error)}") from error
    try:
        return PeftModel.from_pretrained(base, str(adapter)).eval(), tokenizer
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"adapter {adapter} does not fit model {source!r}: {_one_line(error)}") from error


def _same_answers(found: Sequence[int], expected: Sequence[int] | None, path: Path | None) -> None:
    if expected is None or list(found) != list(expected):
        raise ValueError(
            f"{path}: field 'choices' names other answers, or in another order, than the training rows"
        )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _show(prior_precision: Any) -> str:
    if isinstance(prior_precision, float):
        return f"{prior_precision:.4g}"
    return ", ".join(f"{key}: {value:.4g}" for key, value in prior_precision.items())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _describe(device: Any) -> str:
    import torch

    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    capability = f"sm_{properties.major}{properties.minor}"
    return f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"


def _choices(explain: Callable[..., Any], op: str, device: Any) -> list[tuple[str, Any]]:
    """Choices of an op on a device, dtypes with the same outcome together."""
    import torch

    groups: dict[tuple[str, ...], tuple[list[str], Any]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        choice = explain(op, device, dtype)
        key = (choice.backend, choice.reason, *choice.others.values())
        groups.setdefault(key, ([], choice))[0].append(str(dtype).removeprefix("torch."))
    return [(", ".join(dtypes), choice) for dtypes, choice in groups.values()]


def _one_line(error: Exception) -> str:
    """The first line of a message, enough to act on."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Warnings of this package in one line; those of the libraries below say nothing a user could act on."""
    from laplace_lora_fast.errors import LaplaceWarning

    if issubclass(category, LaplaceWarning):
        errors.print(f"[yellow]warning:[/yellow] {escape(str(message))}", soft_wrap=True)
