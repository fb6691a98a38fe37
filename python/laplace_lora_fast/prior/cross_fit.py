"""The prior precision by cross-fitting: folds retrained by the user's own training function, no held-out data.

Every training example is predicted by a model that has not seen it: the one trained without its fold, with a posterior
fitted on the same data. What leave-one-out cannot undo, a kernel that has learnt the labels, is undone by training
again; the price is K trainings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora_fast.fitting.passes import Loader
from laplace_lora_fast.options import check_choice, integer, positive_integer, register
from laplace_lora_fast.prediction import Block, distribution, require_labels
from laplace_lora_fast.prior.grid import checked_grid, checked_link, least, scores, warn_of_edge
from laplace_lora_fast.prior.precision import from_groups, group_keys, grouped_grid
from laplace_lora_fast.prior.tuning import Fitted, Tuned, Tuning
from laplace_lora_fast.progress import track
from laplace_lora_fast.weights import HEAD

Train = Callable[[list[Any]], nn.Module]
Batches = Callable[[list[Any]], Loader]


@register
@dataclass(frozen=True)
class CrossFit(Tuning):
    """Minimises the out-of-fold negative log-likelihood over a grid (Stone 1974, "Cross-validatory choice").

    The K models are trained one after the other and not kept. `train` may keep them: a cross-fitted temperature
    (`evaluation.metrics.cross_fitted_temperature`) takes the same folds.

    Args:
        train: (rows) -> model: trains on these rows, from where the model in question started and in the same way, and
            returns it with its adapter. A transformers Trainer inside does as well as a loop. For as many steps, not
            epochs: after fewer, a model is less sure of its answers than the one in question.
        data: the training rows: examples, or whole batches; any objects that `train` and `batches` take.
        folds: K, 2 to the number of rows.
        batches: (rows) -> loader of labelled batches as for `fit`; None where the rows are batches themselves.
        per: "all" for one prior precision, "side" for one for all lora_A, one for all lora_B and one for trained heads,
            "head" for one for all LoRA weights and one for trained heads.
        grid: ascending values; None for 1e-4 to 1e6, ten a decade. Of a regression with open noise they are products
            of prior precision and noise variance.
        link_approx: predictive link of a classification; None for "probit".
        n_samples: of the "mc" link.
        seed: which rows are in which fold.

    Warns:
        LaplaceWarning: the minimum lies on the edge of the grid.

    Raises:
        InvalidBatchError: a fold's loader is empty, or without labels.
        NumericalError: an NLL is not a number, or none is finite.
        ValueError: an argument is not one of its choices, or `train` gives a model with other layers.
    """

    train: Train = field(repr=False)
    data: Sequence[Any] = field(repr=False)
    folds: int = 4
    batches: Batches | None = field(default=None, repr=False)
    per: str = "all"
    grid: Sequence[float] | None = None
    link_approx: str | None = None
    n_samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("per", self.per, ["all", "side", HEAD])
        object.__setattr__(self, "folds", positive_integer("folds", self.folds))
        object.__setattr__(self, "seed", integer("seed", self.seed))
        if self.grid is not None:
            object.__setattr__(self, "grid", tuple(float(value) for value in self.grid))
        split(len(self.data), self.folds, self.seed)

    def choose(self, fitted: Fitted, progress: bool) -> Tuned:
        if fitted.likelihood.sampled:
            raise ValueError(
                "CrossFit has no predictions by samples of the weights: tune Tokens with HeldOut"
            )
        link, n_samples = checked_link(fitted.likelihood, self.link_approx, self.n_samples)
        grid = checked_grid(self.grid, fitted.dtype)
        names = fitted.fit.curvature.names
        groups, choices, precisions = grouped_grid(group_keys(self.per, names), grid, self.per)
        noise = None if fitted.tunes_noise else fitted.noise
        blocks: list[Block] = []
        folds = split(len(self.data), self.folds, self.seed)
        for fold in track(folds, "cross-fit", progress):
            kept, left_out = rows_of(self.data, fold)
            model, loaders = self.train(kept), [self._loader(rows) for rows in (kept, left_out)]
            with fitted.elsewhere(model, loaders[0], 1.0 if noise is None else noise) as linearised:
                if linearised.curvature.names != names:
                    raise ValueError(
                        "CrossFit: train gives a model whose LoRA layers or trained heads are not those of the fit: "
                        "train the same adapter on the same base model"
                    )
                blocks += distribution(linearised, precisions, loaders[1])
        require_labels(blocks, "CrossFit")
        nll, noises = scores(fitted.likelihood, pooled(blocks), link, n_samples, fitted.seed, noise)
        index = least(nll, choices.tolist())
        best = choices[index].tolist()
        warn_of_edge(best, grid)
        tuned_noise = None if noises is None else float(noises[index])
        scale = 1.0 if tuned_noise is None else tuned_noise**2
        values = {group: value / scale for group, value in zip(groups, best, strict=True)}
        return Tuned(from_groups(values), tuned_noise)

    def _loader(self, rows: list[Any]) -> Loader:
        return rows if self.batches is None else self.batches(rows)


def split(n: int, folds: int, seed: int) -> list[Tensor]:
    """The rows that each fold leaves out: n rows in random order, dealt in turn.

    Raises:
        ValueError: there are fewer than 2 folds, or fewer rows than folds.
    """
    if not 2 <= folds <= n:
        raise ValueError(f"folds must lie in [2, {n}], the number of rows in data, got {folds}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return [order[start::folds].sort().values for start in range(folds)]


def rows_of(data: Sequence[Any], fold: Tensor) -> tuple[list[Any], list[Any]]:
    """The rows outside a fold, and those inside."""
    inside = set(fold.tolist())
    return (
        [row for index, row in enumerate(data) if index not in inside],
        [data[index] for index in fold.tolist()],
    )


def pooled(blocks: Sequence[Block]) -> list[Block]:
    """Blocks of equal numbers of functions as one."""
    by_size: dict[int, list[Block]] = {}
    for block in blocks:
        by_size.setdefault(block.cov.shape[-1], []).append(block)
    return [
        Block(
            torch.cat([each.examples for each in same]),
            torch.cat([each.mean for each in same], -2),
            torch.cat([each.cov for each in same], 1),
            torch.cat([each.targets for each in same if each.targets is not None]),
        )
        for same in by_size.values()
    ]
