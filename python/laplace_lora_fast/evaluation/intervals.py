"""How sure a score on a test set is: bootstrap intervals, paired for differences between methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_lora_fast.evaluation.predictions import Predictions
from laplace_lora_fast.options import positive_integer

RESAMPLES = 1000
Score = Callable[[Predictions], float]


@dataclass(frozen=True)
class Interval:
    """A score with the ends of its 95 % interval.

    Attributes:
        value: on the set itself.
        low: 2.5 % quantile over resamples.
        high: 97.5 % quantile.
    """

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is one: all of the interval lies on one side."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(
    predictions: Predictions, score: Score, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """A score's percentile bootstrap interval over examples (Efron and Tibshirani 1993, chapter 13).

    Args:
        predictions: with labels.
        score: of predictions.
        resamples: how many draws of the examples with replacement.
        seed: of the draws.

    Raises:
        ValueError: `resamples` is no positive integer, or as `score` raises.
    """
    return _interval([predictions], lambda drawn: score(drawn[0]), resamples, seed)


def difference(
    first: Predictions, second: Predictions, score: Score, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Score of the first minus that of the second, with the same examples drawn for both.

    Raises:
        ValueError: as `interval`; or the two are of different examples.
    """
    if not torch.equal(first.known_labels, second.known_labels):
        raise ValueError("a paired difference needs both methods' predictions of the same examples")
    return _interval([first, second], lambda drawn: score(drawn[0]) - score(drawn[1]), resamples, seed)


def of_means(values: Sequence[Tensor], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean over groups of the groups' means, groups and then examples drawn with replacement.

    For a difference over several seeds: a group is a seed, its values the differences of its test examples.

    Args:
        values: [n_g] of each group.
        resamples: how many draws.
        seed: of the draws.

    Raises:
        ValueError: there is no group, or an empty one.
    """
    if not values or any(not len(each) for each in values):
        raise ValueError("values must hold at least one group of at least one number")
    count = positive_integer("resamples", resamples)
    generator = torch.Generator().manual_seed(seed)
    groups = [each.double() for each in values]
    drawn = torch.stack(
        [_resampled_means(each, count, generator) for each in groups], 1
    )  # [resamples, groups]
    picked = torch.randint(len(groups), (count, len(groups)), generator=generator)
    means = drawn.gather(1, picked).mean(1)
    return _summary(float(torch.stack([each.mean() for each in groups]).mean()), means)


def _resampled_means(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    index = torch.randint(len(values), (count, len(values)), generator=generator)
    return values[index].mean(1)


def _interval(
    sets: Sequence[Predictions], score: Callable[[Sequence[Predictions]], float], resamples: int, seed: int
) -> Interval:
    count, n = positive_integer("resamples", resamples), len(sets[0].known_labels)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        index = torch.randint(n, (n,), generator=generator)
        found.append(score([Predictions(each.probs[index], each.known_labels[index]) for each in sets]))
    return _summary(score(sets), torch.tensor(found, dtype=torch.float64))


def _summary(value: float, resampled: Tensor) -> Interval:
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value, low, high)
