"""What each structure would take of a machine, before a pass over the data: in a fit, or without a model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from laplace_lora_fast.options import kinds
from laplace_lora_fast.progress import duration
from laplace_lora_fast.structures.base import Problem, Structure, Verdict
from laplace_lora_fast.structures.cost import Cost

NEVER_REFUSED = 64 * 2**20  # bytes: what takes less than this fits wherever a model does


@dataclass(frozen=True)
class Rates:
    """Of a machine, sustained: what a user states, not what is measured.

    Attributes:
        passes: operations a second in the model's own passes.
        fp64: operations a second in eigenproblems and products in fp64.
    """

    passes: float
    fp64: float


@dataclass(frozen=True)
class Priced:
    """A structure with what it takes.

    Attributes:
        structure: with the options in question.
        cost: None where it states none.
        verdict: whether "auto" may choose it.
        problem: what was priced.
    """

    structure: Structure
    cost: Cost | None
    verdict: Verdict
    problem: Problem

    @property
    def fits(self) -> bool:
        """Whether what is kept is within the budget."""
        return self.cost is not None and self.cost.kept <= self.problem.budget

    def seconds(self, tokens: int, weights: int, rates: Rates) -> float:
        """Of a fit and its end: two operations a weight and token in a forward pass, and in a backward one.

        There are no weight gradients; attention's own products and the reading of memory are not counted.

        Args:
            tokens: of all examples.
            weights: of the model.
            rates: of the machine.
        """
        assert self.cost is not None
        passes = self.cost.forward + self.cost.backward
        return 2.0 * weights * tokens * passes / rates.passes + self.cost.operations / rates.fp64

    def line(self) -> str:
        """In one line, for whoever waits for a fit."""
        if self.cost is None:
            return f"{self.structure!r}: how much memory that takes shows in the first pass only"
        each = f"{_span(self.cost.layers)} a layer, {len(self.cost.layers)} layers"
        return (
            f"{self.structure!r}: keeps {size(self.cost.kept)} ({each}), "
            f"{size(self.cost.fitting)} while fitting, {size(self.cost.solving)} while tuning; "
            f"budget {size(self.problem.budget)}"
        )


def price(structure: Structure, problem: Problem) -> Priced:
    """One structure."""
    return Priced(structure, structure.cost(problem), structure.suits(problem), problem)


def priced(problem: Problem) -> list[Priced]:
    """All registered structures with their defaults that state a cost, in the order in which "auto" asks them."""
    found = [price(kind(), problem) for kind in kinds(Structure)]
    stated = [each for each in found if each.cost is not None]
    return sorted(
        stated, key=lambda each: (each.structure.preference is None, each.structure.preference or 0)
    )


def require_budget(plan: Priced) -> None:
    """Raises ValueError where the budget is too small for the structure in its smallest form; says which is enough."""
    cost, budget = plan.cost, plan.problem.budget
    if cost is None or not plan.structure.uses_budget or cost.least <= max(budget, NEVER_REFUSED):
        return
    raise ValueError(
        f"budget: {plan.structure!r} keeps {size(cost.least)} on the device in its smallest form, more than the "
        f"budget of {size(budget)}: pass LaplaceLoRA(.., budget={cost.least}), fewer layers, or fewer columns"
    )


def chosen(plans: Sequence[Priced]) -> Priced:
    """The first that "auto" would take."""
    return next(plan for plan in plans if plan.structure.preference is not None and plan.verdict.suits)


def size(n_bytes: float) -> str:
    """As a person would say it: "451 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.3g} TiB"


def table(plans: Sequence[Priced], tokens: int, weights: int, rates: Rates) -> list[list[str]]:
    """A row a structure under a row of headings."""
    rows = [["structure", "a layer", "kept", "fitting", "tuning", "time"]]
    for plan in plans:
        assert plan.cost is not None
        rows.append(
            [
                type(plan.structure).__name__,
                _span(plan.cost.layers),
                size(plan.cost.kept),
                size(plan.cost.fitting),
                size(plan.cost.solving),
                duration(plan.seconds(tokens, weights, rates)),
            ]
        )
    return rows


def _span(numbers: Sequence[int]) -> str:
    """The least and the most of some sizes, one where they read alike."""
    return " to ".join(dict.fromkeys([size(min(numbers)), size(max(numbers))]))
