"""The prior precision by the likelihood of held-out data: one pass over them, none over the training data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from laplace_lora_fast.errors import InvalidBatchError
from laplace_lora_fast.fitting.choose import first_batch
from laplace_lora_fast.fitting.passes import Loader
from laplace_lora_fast.options import check_choice, positive_integer, register
from laplace_lora_fast.prediction import Block, distribution, require_labels
from laplace_lora_fast.prior.grid import checked_grid, checked_link, least, scores, warn_of_edge
from laplace_lora_fast.prior.precision import from_groups, group_keys, grouped_grid
from laplace_lora_fast.prior.tuning import Fitted, Tuned, Tuning
from laplace_lora_fast.ranks import Ranks
from laplace_lora_fast.sampling.tokens import drawn_steps, held_out_nll
from laplace_lora_fast.weights import HEAD


@register
@dataclass(frozen=True)
class HeldOut(Tuning):
    """Minimises the held-out negative log-likelihood over a grid: what held wherever it was measured.

    Args:
        loader: labelled batches that were not trained on.
        per: "all" for one prior precision, "side" for one for all lora_A, one for all lora_B and one for trained heads,
            "head" for one for all LoRA weights and one for trained heads.
        grid: ascending values; None for 1e-4 to 1e6, ten a decade. Of a regression with open noise they are products
            of prior precision and noise variance. `Tokens` takes a pass for each value: None is then 1e-2 to 1e6, one a
            decade, and three a decade around the best.
        link_approx: predictive link of a classification; None for "probit".
        n_samples: of the "mc" link; for `Tokens` of the weights, None for 8, by the same random numbers for all values.
        group: process group of torch.distributed whose ranks tune together: each passes its share of the held-out
            data, which may be empty, and holds the same posterior. None: this process alone.

    Warns:
        LaplaceWarning: the minimum lies on the edge of the grid.

    Raises:
        InvalidBatchError: the loader is empty, or without labels.
        NumericalError: an NLL is not a number, or none is finite.
        RankError: another rank of `group` failed, or tunes otherwise.
        ValueError: an argument is not one of its choices, or would not be looked at.
    """

    loader: Loader = field(repr=False)
    per: str = "all"
    grid: Sequence[float] | None = None
    link_approx: str | None = None
    n_samples: int | None = None
    group: ProcessGroup | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_choice("per", self.per, ["all", "side", HEAD])  # few examples decide no more
        if self.grid is not None:
            object.__setattr__(self, "grid", tuple(float(value) for value in self.grid))

    def choose(self, fitted: Fitted, progress: bool) -> Tuned:
        if fitted.likelihood.sampled:
            return self._choose_by_samples(fitted, progress)
        link, n_samples = checked_link(fitted.likelihood, self.link_approx, self.n_samples)
        grid = checked_grid(self.grid, fitted.dtype)
        names = fitted.fit.curvature.names
        groups, choices, precisions = grouped_grid(group_keys(self.per, names), grid, self.per)
        noise = None if fitted.tunes_noise else fitted.noise
        ranks = Ranks(self.group)
        ranks.agree({"the posterior": _facts(fitted), "the grid": [link, n_samples, grid, self.per]})
        with ranks.together(), fitted.linearised(1.0 if noise is None else noise) as linearised:
            first, loader = first_batch(self.loader)
            blocks = []
            if first is not None or ranks.size == 1:
                bar = progress and ranks.rank == 0
                blocks = distribution(linearised, precisions, loader, what="validate", progress=bar)
            require_labels(blocks, "HeldOut")
        blocks = _of_all(blocks, ranks)
        nll, noises = scores(fitted.likelihood, blocks, link, n_samples, fitted.seed, noise)
        index = least(nll, choices.tolist())
        best = choices[index].tolist()
        warn_of_edge(best, grid)
        tuned_noise = None if noises is None else float(noises[index])
        scale = 1.0 if tuned_noise is None else tuned_noise**2
        return Tuned(
            from_groups({group: value / scale for group, value in zip(groups, best, strict=True)}),
            tuned_noise,
        )

    def _choose_by_samples(self, fitted: Fitted, progress: bool) -> Tuned:
        """By the mixture of samples of the weights, one value after the other."""
        if self.link_approx is not None:
            raise ValueError("Tokens is predicted by samples of the weights: leave link_approx out")
        if iter(self.loader) is self.loader:
            raise InvalidBatchError(
                "Tokens needs a pass over the held-out data for each value: pass a DataLoader or a list"
            )
        ranks = Ranks(self.group)
        ranks.agree({"the posterior": _facts(fitted), "the grid": [self.n_samples, self.grid, self.per]})
        n_samples = _SAMPLES if self.n_samples is None else positive_integer("n_samples", self.n_samples)
        grid = checked_grid(_DECADES if self.grid is None else self.grid, fitted.dtype)
        keys = group_keys(self.per, fitted.fit.curvature.names)
        groups = list(dict.fromkeys(keys))
        nlls: dict[tuple[float, ...], float] = {}

        def try_all(choices: Iterable[tuple[float, ...]]) -> None:
            for choice in choices:
                prior = torch.tensor([choice[groups.index(key)] for key in keys], dtype=torch.float64)
                steps = drawn_steps(linearised, prior, n_samples, fitted.seed)
                nlls[choice] = held_out_nll(linearised, steps, self.loader, progress, ranks)

        with fitted.linearised(1.0) as linearised:
            try_all(itertools.product(grid, repeat=len(groups)))
            if self.grid is None and self.per == "all":
                rough = min(nlls, key=lambda choice: nlls[choice])[0]
                try_all((rough * 10 ** (step / 3),) for step in (-2, -1, 1, 2))
        tried = sorted(nlls)
        best = tried[least(torch.tensor([nlls[choice] for choice in tried], dtype=torch.float64), tried)]
        warn_of_edge(best, [tried[0][0], tried[-1][0]] if len(groups) == 1 else grid)
        return Tuned(from_groups(dict(zip(groups, best, strict=True))))


def _facts(fitted: Fitted) -> list[float | None]:
    """Numbers that only the same fits have."""
    return [fitted.fit.n_examples, fitted.fit.log_likelihood, fitted.noise]


def _of_all(blocks: Sequence[Block], ranks: Ranks) -> list[Block]:
    """The blocks of all ranks, rank by rank, on each of them. Raises InvalidBatchError if there are none."""
    if ranks.size == 1:
        return list(blocks)
    own = {block.mean.shape[-1]: block for block in blocks}
    if not ranks.gather_numbers([len(own)]).any():
        raise InvalidBatchError("the loader yielded no batch")
    sizes = ranks.gather(torch.tensor(list(own), dtype=torch.long)).unique().tolist()
    return [_block_of_all(own.get(size), ranks) for size in sizes]


def _block_of_all(block: Block | None, ranks: Ranks) -> Block:
    """Examples come first in what is gathered, and are numbered anew: nobody asks for their places."""

    def gathered(x: Tensor | None, axis: int) -> Tensor:
        return ranks.gather(None if x is None else x.movedim(axis, 0).contiguous()).movedim(0, axis)

    parts = (None, None, None) if block is None else (block.mean, block.cov, block.targets)
    cov = gathered(parts[1], 1)
    return Block(torch.arange(cov.shape[1]), gathered(parts[0], -2), cov, gathered(parts[2], 0))


_DECADES = [10.0**decade for decade in range(-2, 7)]
_SAMPLES = 8
