"""How good and how honest class probabilities are: accuracy, calibration, likelihood, temperature scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from laplace_lora_fast.errors import NumericalError

ECE_BINS = 15
_ROW_SUM_TOLERANCE = 1e-3  # probabilities may come from half precision


@dataclass(frozen=True)
class Metrics:
    """Scores of class probabilities on a labelled set.

    Attributes:
        accuracy: Share of examples whose most probable class is the label, in [0, 1].
        ece: Expected calibration error with 15 equal bins of confidence, in [0, 1] (Guo et al. 2017).
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
class Predictions:
    """Class probabilities with the labels they are judged by.

    Attributes:
        probs: [N, C], fp64 on the CPU; rows are non-negative and sum to one.
        labels: [N], int64 on the CPU, in [0, C).

    Raises:
        ValueError: A shape, a label, a row sum or a value is wrong; the message names the first such row.
    """

    probs: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        probs, labels = self.probs.detach().cpu().double(), self.labels.detach().cpu()
        if probs.dim() != 2 or probs.shape[0] < 1 or probs.shape[1] < 2:
            raise ValueError(f"probs must have shape [N, C] with N >= 1 and C >= 2, got {list(probs.shape)}")
        _check_labels(labels, *probs.shape)
        _refuse(~probs.isfinite().all(1), "probs are not finite")
        _refuse((probs < 0).any(1), "probs has a negative value")
        _refuse((probs.sum(1) - 1).abs() > _ROW_SUM_TOLERANCE, "probs do not sum to one")
        object.__setattr__(self, "probs", probs)
        object.__setattr__(self, "labels", labels.long())

    @property
    def confidence(self) -> Tensor:
        """Probability of the most probable class, [N]."""
        return self.probs.amax(1)

    @property
    def correct(self) -> Tensor:
        """Whether the most probable class is the label, [N] bool."""
        return self.probs.argmax(1) == self.labels

    def metrics(self) -> Metrics:
        """Scores the predictions."""
        one_hot = torch.nn.functional.one_hot(self.labels, self.probs.shape[1])
        of_label = self.probs.gather(1, self.labels[:, None])
        # torchmetrics works in fp32 and gives a confidence of exactly one a sixteenth bin of its own.
        below_one = 1 - torch.finfo(torch.float32).eps / 2
        ece = multiclass_calibration_error(
            self.probs.clamp(max=below_one),
            self.labels,
            num_classes=self.probs.shape[1],
            n_bins=ECE_BINS,
            norm="l1",
        )
        return Metrics(
            accuracy=self.correct.double().mean().item(),
            ece=ece.item(),
            nll=-of_label.log().mean().item(),
            brier=(self.probs - one_hot).square().sum(1).mean().item(),
            count=len(self.labels),
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
    _check_labels(labels, *logits.shape)
    _refuse(~logits.isfinite().all(1), "val_logits are not finite")
    margins = logits - logits.gather(1, labels.long()[:, None])
    if (margins <= 0).all():
        raise NumericalError("temperature scaling has no optimum: every held-out label has the largest logit")
    if margins.mean(1).mean() >= 0:
        raise NumericalError(
            "temperature scaling has no optimum: the held-out logits do not favour the labels"
        )
    return _best_temperature(margins)


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


def _check_labels(labels: Tensor, n: int, classes: int) -> None:
    if labels.shape != (n,) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"labels must hold {n} class indices, got shape {list(labels.shape)} of {labels.dtype}"
        )
    _refuse((labels < 0) | (labels >= classes), f"labels must lie in [0, {classes})")


def _refuse(bad: Tensor, message: str) -> None:
    if bad.any():
        raise ValueError(f"{message}: row {int(bad.int().argmax())}")
