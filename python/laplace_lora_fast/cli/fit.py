"""The command `laplace-lora fit`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from laplace_lora_fast.cli import checks, loading
from laplace_lora_fast.cli.arguments import Adapter, BatchSize, Device, Dtype, Model, Truncate

console = Console()


def fit(
    model: Model,
    adapter: Adapter,
    data: Annotated[
        Path,
        typer.Option(
            help='Training rows, JSON lines: {"prompt", "choices", "label"}, or texts {"prompt", "completion"}.'
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the posterior.")] = Path("posterior"),
    val: Annotated[Path | None, typer.Option(help="Held-out rows, for --prior held_out.")] = None,
    prior: Annotated[
        str | None,
        typer.Option(
            help="held_out (on --val), evidence (a poor guide on an over-trained adapter without --refit), "
            "leave_one_out (one training row at a time; the model is refitted), or a number. Default: held_out with "
            "--val, else evidence."
        ),
    ] = None,
    per: Annotated[
        str | None,
        typer.Option(
            help="all (default): one prior precision; side: one for lora_A, one for lora_B (held_out, evidence); "
            "head: one for LoRA, one for trained heads (both); layer: one a layer (evidence)."
        ),
    ] = None,
    grid: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW HIGH",
            help="Prior precisions that held_out and leave_one_out try, 10 a decade; else 1e-4 to 1e6.",
        ),
    ] = None,
    structure: Annotated[
        str,
        typer.Option(
            help="Of the curvature: rows, kfac, ekfac or diagonal; auto takes rows where they are few."
        ),
    ] = checks.AUTO,
    columns: Annotated[
        int | None,
        typer.Option(min=1, help="Of rows' or kfac's sketches; more are more exact. Default: 128."),
    ] = None,
    refit: Annotated[
        bool | None,
        typer.Option(
            help="rows: predict with the linearised model's own optimum under the prior, which moves the predictions, "
            "not with the adapter's own. Default: with --prior leave_one_out; and without --val, --prior and --per, if "
            "--structure is auto or rows, --fisher exact, and there are no more than "
            f"{checks.MOST_REFIT_ROWS} rows x (choices - 1)."
        ),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="kfac, ekfac: reduce (default), expand or paper.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="kfac, ekfac: eigenpairs kept of each large factor.")
    ] = None,
    factors: Annotated[
        str | None, typer.Option(help="kfac, ekfac: dense, sketch or auto (default: dense within 4 GiB).")
    ] = None,
    fisher: Annotated[
        str | None, typer.Option(help="Any but auto: exact (default), mc (sampled labels) or empirical.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help='Of the layers that get a posterior: their whole names match, as in PEFT\'s target_modules; "last" '
            "for the output head or last layer. '(?!.*experts).*' leaves out what has experts in its name.",
        ),
    ] = None,
    trained: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help='Of the weights that were trained, where that is not all: ".*lora_B" for an adapter whose lora_A '
            "stayed as it was drawn.",
        ),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="Of a choice, where rows have different ones or ones of several tokens: sum (default) or mean of its "
            "tokens' log probabilities."
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Texts: label sequences drawn for each. Default: 8.")
    ] = None,
    truncate: Truncate = False,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: int = 0,
) -> None:
    """Fit the posterior of an adapter on its training rows and tune the prior precision."""
    from laplace_lora_fast import LaplaceLoRA
    from laplace_lora_fast.cli.rows import holds_texts
    from laplace_lora_fast.data.prompts import read_rows
    from laplace_lora_fast.data.texts import read_texts
    from laplace_lora_fast.saving.posterior import FILE_NAME

    texts = holds_texts(data)
    read: Any = read_texts if texts else read_rows
    rows = read(data)
    val_rows = None if val is None else read(val)
    options = {"columns": columns, "refit": refit, "tokens": tokens, "rank": rank, "factors": factors}
    options["fisher"] = fisher
    checks.check_kind_of_rows(texts, score, samples)
    refits = prior == "leave_one_out"
    if texts:
        prior = checks.prior_of_texts(prior, val is not None)
    elif prior is None:
        few = sum(len(row.choices) - 1 for row in rows) <= checks.MOST_REFIT_ROWS
        refits = val is None and few and per is None and checks.may_refit(structure, options)
        prior = checks.prior_by_default(val is not None, refits or bool(refit))
    tuning = checks.tuning_of(prior, {"loader": val_rows, "per": per, "grid": checks.spread(grid)})
    chosen = checks.structure_of(structure, options, refit=refits)
    if not isinstance(tuning, float):
        checks.check_pair(tuning, chosen)
    peft_model, reader = loading.load(model, adapter, device, dtype, batch_size, truncate)
    task = reader.tokens(samples) if texts else reader.task(rows, score)
    train = reader.batches(task, rows, data)
    if val is not None:
        tuning = replace(tuning, loader=reader.batches(task, val_rows, val).batches)  # type: ignore[type-var]
    la = LaplaceLoRA(
        peft_model,
        task,
        structure=chosen,
        layers=checks.names_matching("--layers", layers, "last"),
        trained=checks.names_matching("--trained", trained, "all"),
        seed=seed,
    )
    checks.make_writable(out)
    checks.check_output("--out", out / FILE_NAME, [data, *([] if val is None else [val])])
    la.fit(train.batches)
    by = ""
    if isinstance(tuning, float):
        la.prior_precision = tuning
    else:
        la.optimize_prior_precision(tuning)
        by = f", chosen by {prior}"
    la.save(out, tokenizer=reader.tokenizer)
    fitted, _ = la.snapshot()
    evidence = "" if texts else f"log marginal likelihood {la.log_marginal_likelihood().item():.4g}. "
    for line in (
        f"Fitted {fitted.structure} on {len(rows)} rows, {task}; "
        f"prior precision {checks.shown(la.prior_precision)}{by}.",
        f"{evidence}Written: {out}",
    ):
        console.print(escape(line), soft_wrap=True)
