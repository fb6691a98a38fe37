"""How good and how honest class probabilities are: accuracy, calibration, likelihood, temperature scaling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from laplace_lora_fast.errors import NumericalError
from laplace_lora_fast.prior.cross_fit import Train, rows_of, split

ECE_BINS = 15


class Judged(Protocol):
    """Class probabilities with labels: see `predictions.Predictions`."""

    @property
    def probs(self) -> Tensor:
        """[N, C]."""

    @property
    def labels(self) -> Tensor | None:
        """[N], or None."""

    @property
    def confidence(self) -> Tensor:
        """Probability of the most probable class, [N]."""

    @property
    def correct(self) -> Tensor:
        """Whether the most probable class is the label, [N] bool."""

    @property
    def known_labels(self) -> Tensor:
        """[N]. Raises ValueError where there are none."""


class JudgedRegression(Protocol):
    """Means and variances with targets: see `predictions.RegressionPredictions`."""

    @property
    def mean(self) -> Tensor:
        """[N, C]."""

    @property
    def variance(self) -> Tensor:
        """[N, C]."""

    @property
    def known_labels(self) -> Tensor:
        """[N, C]. Raises ValueError where there are none."""


@dataclass(frozen=True)
class Metrics:
    """Scores of class probabilities on a labelled set.

    Attributes:
        accuracy: Share of examples whose most probable class is the label, in [0, 1].
        ece: Expected calibration error with 15 equal bins of confidence, (0, 1/15] to (14/15, 1], in [0, 1] (Guo et
            al. 2017).
        nll: Mean negative log probability of the label, in nats.
        brier: Mean over examples of the squared distance between the probabilities and the one-hot label, summed
            over classes, in [0, 2] (Brier 1950).
        count: Number of examples.
    """

    accuracy: float
    ece: float
    nll: float
    brier: float
    count: int


@dataclass(frozen=True)
class RegressionMetrics:
    """Scores of Gaussian predictions on a labelled set.

    Attributes:
        rmse: Root mean squared error of the means.
        nll: Mean over examples of minus the log density of the targets, in nats, marginal in each output.
        coverage_68: Share of targets within one standard deviation.
        coverage_95: Share of targets within 1.96 standard deviations.
        count: Number of examples.
    """

    rmse: float
    nll: float
    coverage_68: float
    coverage_95: float
    count: int


@dataclass(frozen=True)
class LabelMetrics:
    """Scores of probabilities of independent labels.

    Attributes:
        accuracy: Share of labels that the more probable value meets.
        exact: Share of examples all of whose labels it meets.
        nll: Mean over examples of minus the log probability of all their labels, in nats.
        brier: Mean over labels of the squared distance between probability and label.
        count: Number of examples.
    """

    accuracy: float
    exact: float
    nll: float
    brier: float
    count: int


def score_labels(probs: Tensor, labels: Tensor) -> LabelMetrics:
    """Scores probabilities [N, C] of zeros and ones [N, C]."""
    right = (probs > 0.5) == (labels > 0.5)
    of_label = torch.where(labels > 0.5, probs, 1 - probs)
    return LabelMetrics(
        accuracy=right.double().mean().item(),
        exact=right.all(1).double().mean().item(),
        nll=-of_label.log().sum(1).mean().item(),
        brier=(probs - labels).square().mean().item(),
        count=len(labels),
    )


@dataclass(frozen=True)
class Bins:
    """Predictions grouped by confidence into 15 bins (lower, upper]; empty bins are left out.

    Attributes:
        confidence: Mean confidence of each bin, [B].
        accuracy: Share of correct predictions in each bin, [B].
        count: Number of predictions in each bin, [B].
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor


def bin_of(confidence: Tensor) -> Tensor:
    """The bin, 0 to 14, of each confidence, fp64: a value on an edge belongs below it."""
    edges = [index / ECE_BINS for index in range(1, ECE_BINS)]
    return torch.bucketize(confidence.contiguous(), torch.tensor(edges, dtype=torch.float64))


def bin_by_confidence(predictions: Judged) -> Bins:
    """Groups predictions into the bins of the calibration error. Raises ValueError where there are no labels."""
    confidence, correct = predictions.confidence, predictions.correct.double()
    index = bin_of(confidence)
    count = torch.bincount(index, minlength=ECE_BINS)
    some = count > 0
    mean, accuracy = (
        torch.bincount(index, values, minlength=ECE_BINS)[some] / count[some]
        for values in (confidence, correct)
    )
    return Bins(mean, accuracy, count[some])


def score(predictions: Judged) -> Metrics:
    """Scores class probabilities. Raises ValueError where there are no labels."""
    probs, labels = predictions.probs, predictions.known_labels
    one_hot = torch.nn.functional.one_hot(labels, probs.shape[1])
    of_label = probs.gather(1, labels[:, None])
    bins = bin_by_confidence(predictions)
    gaps = (bins.confidence - bins.accuracy).abs()
    return Metrics(
        accuracy=predictions.correct.double().mean().item(),
        ece=(gaps * bins.count).sum().item() / len(labels),
        nll=-of_label.log().mean().item(),
        brier=(probs - one_hot).square().sum(1).mean().item(),
        count=len(labels),
    )


def score_regression(predictions: JudgedRegression) -> RegressionMetrics:
    """Scores means and variances. Raises ValueError where there are no labels."""
    errors, variance = predictions.known_labels - predictions.mean, predictions.variance
    z = errors.abs() / variance.sqrt()
    nll = 0.5 * (errors.square() / variance + (2 * math.pi * variance).log())
    return RegressionMetrics(
        rmse=errors.square().mean().sqrt().item(),
        nll=nll.sum(1).mean().item(),
        coverage_68=(z <= 1).double().mean().item(),
        coverage_95=(z <= 1.959963984540054).double().mean().item(),
        count=len(errors),
    )


def temperature_scale(val_logits: Tensor, val_labels: Tensor) -> float:
    r"""The temperature that minimises the NLL of held-out data (Guo et al. 2017).

    Minimises the mean over examples of $-\log \mathrm{softmax}(f / T)_y$ to machine precision. In 1 / T this is
    convex, so the optimum is the only one.

    Args:
        val_logits: [N, C]. Log probabilities do as well: softmax does not see a shift.
        val_labels: [N], in [0, C).

    Returns:
        T, positive.

    Raises:
        NumericalError: No temperature is best: every label has the largest logit (the NLL falls until T = 0), or
            the logits say nothing about the labels (until T is infinite).
        ValueError: A shape, a label or a logit is wrong.
    """
    logits, labels = val_logits.detach().cpu().double(), val_labels.detach().cpu()
    if logits.dim() != 2 or logits.shape[0] < 1 or logits.shape[1] < 2:
        raise ValueError(
            f"val_logits must have shape [N, C] with N >= 1 and C >= 2, got {list(logits.shape)}"
        )
    check_labels(labels, *logits.shape)
    refuse_rows(~logits.isfinite().all(1), "val_logits are not finite")
    margins = logits - logits.gather(1, labels.long()[:, None])
    if (margins <= 0).all():
        raise NumericalError("temperature scaling has no optimum: every held-out label has the largest logit")
    if margins.mean(1).mean() >= 0:
        raise NumericalError(
            "temperature scaling has no optimum: the held-out logits do not favour the labels"
        )
    return _best_temperature(margins)


def cross_fitted_temperature(
    train: Train,
    data: Sequence[Any],
    predict: Callable[[nn.Module, list[Any]], tuple[Tensor, Tensor]],
    folds: int = 4,
    seed: int = 0,
) -> float:
    """The temperature of out-of-fold logits: the rival of `CrossFit`, from the same folds.

    Args:
        train: (rows) -> model: trains on these rows as the model in question was trained.
        data: The training rows.
        predict: (model, rows) -> logits [n, C] and labels [n] of rows that the model has not seen.
        folds: K.
        seed: Which rows are in which fold.

    Returns:
        T, positive.

    Raises:
        NumericalError: As `temperature_scale`.
        ValueError: Likewise, or `folds` is not in [2, number of rows].
    """
    found = []
    for fold in split(len(data), folds, seed):
        kept, left_out = rows_of(data, fold)
        found.append(predict(train(kept), left_out))
    logits, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return temperature_scale(logits, labels)


def _best_temperature(margins: Tensor) -> float:
    """L-BFGS on log T; `margins` [N, C] are logits minus the label's logit, scaled first so that T is near one."""
    scale = margins.abs().mean().item()
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [log_t], max_iter=200, tolerance_grad=1e-14, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = (margins / scale / log_t.exp()).logsumexp(1).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)
    return scale * math.exp(log_t.item())


def check_labels(labels: Tensor, n: int, classes: int) -> None:
    """Raises ValueError unless labels are N class indices."""
    if labels.shape != (n,) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"labels must hold {n} class indices, got shape {list(labels.shape)} of {labels.dtype}"
        )
    refuse_rows((labels < 0) | (labels >= classes), f"labels must lie in [0, {classes})")


def refuse_rows(bad: Tensor, message: str) -> None:
    """Raises ValueError with the first row that is bad."""
    if bad.any():
        raise ValueError(f"{message}: row {int(bad.int().argmax())}")
