"""Which structure of the curvature serves a fit, and the passes over the data each one takes."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from itertools import chain
from typing import Any

from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.blocks import BlockCurvature
from laplace_lora_fast.devices import device_of
from laplace_lora_fast.dual import RowAccumulator
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError
from laplace_lora_fast.fit import Fit, Objective
from laplace_lora_fast.kfac import FactorKind, FactorPlan, Kfac, KfacAccumulator
from laplace_lora_fast.likelihoods import Fisher
from laplace_lora_fast.moments import DiagAccumulator, EkfacAccumulator
from laplace_lora_fast.progress import length
from laplace_lora_fast.refit import RefitAccumulator
from laplace_lora_fast.taps import Tap

Batch = Mapping[str, Any]
Loader = Iterable[Batch]
_MOST_ROWS = 4096  # an eigendecomposition of R x R, which tuning takes: about a minute on two cores here


class Structure(str, Enum):
    """The form in which the curvature is kept."""

    KFAC = "kfac"
    EKFAC = "ekfac"
    DUAL = "dual"
    DIAG = "diag"
    AUTO = "auto"


class Mean(str, Enum):
    """What the linearised model's outputs are centred on."""

    MAP = "map"  # the trained model
    REFIT = "refit"  # the linearised model's own optimum under the prior


@dataclass(frozen=True)
class FitOptions:
    """How a curvature is fitted; see `LaplaceLoRA` for each field.

    Raises:
        ValueError: a field is not one of its choices.
    """

    structure: str
    mean: str
    kfac: str | None
    fisher: str
    mc_samples: int
    factor: str
    rank: int | None
    memory_budget: int
    sketch_size: int
    row_sketch_size: int
    seed: int

    def __post_init__(self) -> None:
        for name, choices in (
            ("structure", Structure),
            ("mean", Mean),
            ("kfac", Kfac),
            ("fisher", Fisher),
            ("factor", FactorKind),
        ):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), [choice.value for choice in choices])
        for name in ("mc_samples", "sketch_size", "row_sketch_size", "rank", "memory_budget"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, positive_integer(name, getattr(self, name)))
        object.__setattr__(self, "seed", integer("seed", self.seed))
        exact = Mean(self.mean) is Mean.REFIT or self.structure in ("dual", "diag")
        if exact and self.kfac_options:
            what = f"mean={self.mean!r}" if Mean(self.mean) is Mean.REFIT else f"structure={self.structure!r}"
            raise ValueError(f"{what} has no Kronecker factors: leave out {' and '.join(self.kfac_options)}")
        if Mean(self.mean) is Mean.REFIT and not (
            self.structure in ("dual", "auto") and self.fisher == "exact"
        ):
            raise ValueError("mean='refit' needs structure='dual' (or 'auto') and fisher='exact'")

    @property
    def kfac_options(self) -> list[str]:
        """Those the caller set of the options that only KFAC has."""
        unset = {"kfac": None, "factor": "auto", "rank": None}
        return [name for name, value in unset.items() if getattr(self, name) != value]

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def plan(self) -> FactorPlan:
        """Dense or sketched factors."""
        return FactorPlan(FactorKind(self.factor), self.memory_budget, self.sketch_size, self.seed)


def check_choice(argument: str, value: str, choices: Sequence[str]) -> str:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{argument} must be one of {list(choices)}, got {value!r}")
    return value


def integer(argument: str, value: Any) -> int:
    """`value` as a Python int, which is what can be saved. Raises ValueError for anything but a whole number."""
    try:
        return int(value) if isinstance(value, float) and value.is_integer() else operator.index(value)
    except TypeError as error:
        raise ValueError(f"{argument} must be an integer, got {value!r}") from error


def positive_integer(argument: str, value: Any) -> int:
    """`integer`, at least 1."""
    number = integer(argument, value)
    if number < 1:
        raise ValueError(f"{argument} must be at least 1, got {number}")
    return number


def fit_structure(objective: Objective, loader: Loader, options: FitOptions, progress: bool) -> Fit:
    """Fits the curvature in the structure the options ask for.

    Raises:
        InvalidBatchError: the loader is empty, a batch is unusable, or two passes need a loader that allows them.
        NumericalError: a layer's curvature is not finite.
    """
    structure = Structure(options.structure)
    if structure is Structure.AUTO and Mean(options.mean) is Mean.MAP:
        chosen, reason, loader = _choose(objective, loader, options)
        fit = fit_structure(objective, loader, replace(options, structure=chosen.value), progress)
        return replace(fit, reason=reason)
    if Mean(options.mean) is Mean.REFIT:
        refit = RefitAccumulator(
            objective.sites, options.row_sketch_size, options.memory_budget, options.seed
        )
        return objective.accumulate(loader, refit, "fit", progress)
    if structure is Structure.DUAL:
        exact = objective.fisher is Fisher.EXACT
        rows = RowAccumulator(
            objective.sites, options.row_sketch_size, options.memory_budget, options.seed, exact
        )
        return objective.accumulate(loader, rows, "fit", progress)
    if structure is Structure.DIAG:
        return objective.accumulate(loader, DiagAccumulator(objective.sites), "fit", progress)
    with objective.ranks.together():
        if structure is Structure.EKFAC and iter(loader) is loader:
            raise InvalidBatchError(
                "structure='ekfac' passes over train_loader twice: pass a DataLoader or a list"
            )
    omegas, loader = _shared_omegas(objective, loader, options)
    kfac = _kfac(objective, options, omegas)
    fit = objective.accumulate(loader, kfac, "fit", progress)
    if structure is Structure.EKFAC:
        assert isinstance(fit.curvature, BlockCurvature)
        second = objective.accumulate(
            loader, EkfacAccumulator(objective.sites, fit.curvature), "ekfac", progress
        )
        if second.n_examples != fit.n_examples:
            raise InvalidBatchError(
                f"train_loader gave {fit.n_examples} examples in a first pass and {second.n_examples} in a second: "
                "structure='ekfac' needs the same data twice"
            )
        return second
    return fit


def _kfac(
    objective: Objective, options: FitOptions, omegas: dict[int, Tensor] | None = None
) -> KfacAccumulator:
    mode = Kfac(options.kfac or "reduce")
    return KfacAccumulator(objective.sites, mode, options.plan(), options.rank, omegas)


def _shared_omegas(
    objective: Objective, loader: Loader, options: FitOptions
) -> tuple[dict[int, Tensor] | None, Loader]:
    """Where several ranks sketch, the sketches that the first one would make of its first batch; and the loader."""
    ranks = objective.ranks
    widths = [width for site in objective.sites for width in (site.d_in, site.d_out)]
    itemsize = lk.accumulation_dtype(objective.sites[0].A.dtype).itemsize
    if ranks.size == 1 or all(options.plan().choose(widths, itemsize)):
        return None, loader
    with ranks.together():
        first, loader = _first_batch(loader)
        probe = _kfac(objective, options)
        objective.observe([first], probe, "sketches", False)
    return {index: ranks.from_first(omega) for index, omega in probe.omegas().items()}, loader


class _Resumed:
    """A loader whose first batch has been looked at: its next pass starts there, later ones start anew.

    A loader that hands out one stream again and again would lose that batch, and a shuffled one would draw another.
    """

    def __init__(self, loader: Loader, batches: Iterator[Batch]) -> None:
        self._loader = loader
        self._batches: Iterator[Batch] | None = batches

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        batches, self._batches = self._batches, None
        return iter(self._loader) if batches is None else batches


def _first_batch(loader: Loader) -> tuple[Batch, Loader]:
    """The first batch, and a loader that still has it. Raises InvalidBatchError if there is none."""
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        raise InvalidBatchError("train_loader yielded no batch")
    return first, _Resumed(loader, chain([first], batches))


def _choose(objective: Objective, loader: Loader, options: FitOptions) -> tuple[Structure, str, Loader]:
    """Dual where its rows are few and it fits the memory budget; KFAC otherwise, and where its options are named."""
    if options.kfac_options:
        return Structure.KFAC, "kfac, factor or rank asks for it", loader
    ranks, head = objective.ranks, objective.head
    with ranks.together():
        first, loader = _first_batch(loader)
        inputs = head.inputs(first, device_of(objective.model), DeferredChecks())
        if head.answer_token_ids is not None:
            outputs = len(head.answer_token_ids)
        else:
            with Tap(objective.model, head, list(objective.sites), None) as tap:
                outputs = tap.forward(inputs).shape[1]
    batches = length(loader)
    examples = math.nan if batches is None else batches * inputs.batch_size
    examples = float(ranks.gather_numbers([examples]).sum())
    if math.isnan(examples):
        return Structure.KFAC, "the loader has no length, so the number of rows is unknown", loader
    per_example = outputs - (objective.likelihood.name == "classification")
    if Fisher(options.fisher) is not Fisher.EXACT:
        per_example = options.mc_samples if Fisher(options.fisher) is Fisher.MC else 1
    rows = int(examples) * per_example
    sizes = [(site.rank, width) for site in objective.sites for width in (site.d_in, site.d_out)]
    weights = sum(rank * width for rank, width in sizes)
    row_bytes = 4 * rows * sum(rank * min(width, options.row_sketch_size) for rank, width in sizes)
    kernel_bytes = 3 * 8 * rows**2  # K, its factor and its eigenvectors
    facts = f"about {rows} rows, {weights} weights, {(row_bytes + kernel_bytes) / 2**20:.0f} MiB"
    if rows < min(weights, _MOST_ROWS) and row_bytes + kernel_bytes <= options.memory_budget:
        return Structure.DUAL, f"{facts} suit the dual", loader
    return Structure.KFAC, f"{facts} do not suit the dual", loader
