"""Predictions with the labels they are judged by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from laplace_lora_fast.evaluation.metrics import (
    LabelMetrics,
    Metrics,
    RegressionMetrics,
    check_labels,
    refuse_rows,
    score,
    score_labels,
    score_regression,
)

_ROW_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Predictions:
    """Class probabilities, and labels where there are any.

    Attributes:
        probs: [N, C], fp64 on the CPU; rows are non-negative and sum to one.
        labels: [N], int64 on the CPU, in [0, C), or None.

    Raises:
        ValueError: a shape, a label, a row sum or a value is wrong; the message names the first such row.
    """

    probs: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        probs = self.probs.detach().cpu().double()
        if probs.dim() != 2 or probs.shape[0] < 1 or probs.shape[1] < 2:
            raise ValueError(f"probs must have shape [N, C] with N >= 1 and C >= 2, got {list(probs.shape)}")
        rounding = torch.finfo(self.probs.dtype).eps if self.probs.is_floating_point() else 0.0
        refuse_rows(~probs.isfinite().all(1), "probs are not finite")
        refuse_rows((probs < 0).any(1), "probs has a negative value")
        off = (probs.sum(1) - 1).abs()
        refuse_rows(off > max(_ROW_SUM_TOLERANCE, rounding), "probs do not sum to one")
        object.__setattr__(self, "probs", probs)
        if self.labels is not None:
            labels = self.labels.detach().cpu()
            check_labels(labels, *probs.shape)
            object.__setattr__(self, "labels", labels.long())

    @property
    def confidence(self) -> Tensor:
        """Probability of the most probable class, [N]."""
        return self.probs.amax(1)

    @property
    def correct(self) -> Tensor:
        """Whether the most probable class is the label, [N] bool."""
        return self.probs.argmax(1) == self.known_labels

    @property
    def known_labels(self) -> Tensor:
        """The labels. Raises ValueError where there are none."""
        return _known(self.labels)

    def metrics(self) -> Metrics:
        """Accuracy, calibration error, NLL and Brier score."""
        return score(self)

    def plot(self, path: str | Path) -> None:
        """Writes a reliability diagram; needs the extra "evaluate"."""
        from laplace_lora_fast.evaluation.plots import reliability_diagram

        reliability_diagram({"": {"": self}}, path)


@dataclass(frozen=True)
class RegressionPredictions:
    """Means and variances of targets, and the targets where there are any.

    Attributes:
        mean: [N, C], fp64 on the CPU.
        variance: [N, C], with the noise in it.
        labels: [N, C] or None.
    """

    mean: Tensor
    variance: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "variance", "labels"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, value.detach().cpu().double())
        shapes = [tuple(x.shape) for x in (self.mean, self.variance, self.labels) if x is not None]
        if len(set(shapes)) > 1 or self.mean.dim() != 2:
            raise ValueError(f"mean, variance and labels must all be [N, C], got {shapes}")

    @property
    def known_labels(self) -> Tensor:
        """The targets. Raises ValueError where there are none."""
        return _known(self.labels)

    def metrics(self) -> RegressionMetrics:
        """Root mean squared error, NLL, and how many targets lie in the 68 % and 95 % intervals."""
        return score_regression(self)


@dataclass(frozen=True)
class LabelPredictions:
    """Answers that are no distribution over classes, such as probabilities of independent labels, and targets.

    Attributes:
        probs: [N, C], fp64 on the CPU.
        labels: [N, ..] or None.
    """

    probs: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "probs", self.probs.detach().cpu().double())
        if self.labels is not None:
            object.__setattr__(self, "labels", self.labels.detach().cpu())

    @property
    def known_labels(self) -> Tensor:
        """The targets. Raises ValueError where there are none."""
        return _known(self.labels)

    def metrics(self) -> LabelMetrics:
        """Accuracy, NLL and Brier score of zeros and ones."""
        return score_labels(self.probs, self.known_labels.double())


def _known(labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError("there are no labels to judge by: pass batches with 'labels'")
    return labels
