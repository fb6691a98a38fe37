"""How far stated probabilities are from what happens: calibration errors, the Brier score's parts, separation.

Scores of a single set; `intervals` says how sure they are. Definitions are the papers'; where torchmetrics has a score,
the tests compare with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_lora_fast.evaluation.metrics import ECE_BINS, Judged, bin_of

_MESH = 1001  # points of the smoothed curve
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Calibration:
    """Calibration of class probabilities on a labelled set; less is better in all of them.

    Attributes:
        adaptive: expected calibration error of the confidence in 15 bins of equally many examples (Nguyen and O'Connor
            2015).
        class_wise: mean over classes of the expected calibration error of the class's probability, 15 equal bins
            (Kull et al. 2019).
        smooth: smooth calibration error of the confidence, without bins (Blasiok and Nakkiran 2024).
        brier: the Brier score, [0, 2]: reliability - resolution + uncertainty + within.
        reliability: its part from probabilities that are not the frequencies in their bins (Murphy 1973).
        resolution: its part from bins that differ: more is better.
        uncertainty: its part from the labels' own frequencies.
        within: what the bins hide: variance of the probabilities inside them, less twice their covariance with the
            labels (Stephenson, Coelho and Jolliffe 2008).
    """

    adaptive: float
    class_wise: float
    smooth: float
    brier: float
    reliability: float
    resolution: float
    uncertainty: float
    within: float


def calibration(predictions: Judged) -> Calibration:
    """All of them. Raises ValueError where there are no labels."""
    brier = brier_parts(predictions)
    return Calibration(
        adaptive=adaptive_ece(predictions),
        class_wise=class_wise_ece(predictions),
        smooth=smooth_ece(predictions.confidence, predictions.correct.double()),
        brier=sum(part * sign for part, sign in zip(brier, (1, -1, 1, 1), strict=True)),
        reliability=brier[0],
        resolution=brier[1],
        uncertainty=brier[2],
        within=brier[3],
    )


def adaptive_ece(predictions: Judged) -> float:
    """Expected calibration error of the confidence in 15 bins of equally many examples, one more in the first ones."""
    order = predictions.confidence.argsort(stable=True)
    gaps = (predictions.confidence - predictions.correct.double())[order]
    bins = torch.tensor_split(gaps, min(ECE_BINS, len(gaps)))
    return sum(abs(float(each.sum())) for each in bins) / len(gaps)


def class_wise_ece(predictions: Judged) -> float:
    """Mean over classes of the expected calibration error of the class's probability, 15 equal bins."""
    gaps = predictions.probs - _one_hot(predictions)
    errors = [
        torch.bincount(bin_of(p), gap, minlength=ECE_BINS).abs().sum() / len(gap)
        for p, gap in zip(predictions.probs.mT, gaps.mT, strict=True)
    ]
    return float(torch.stack(errors).mean())


def brier_parts(predictions: Judged) -> tuple[float, float, float, float]:
    """Reliability, resolution, uncertainty and what is within bins, summed over classes, 15 equal bins each."""
    parts = torch.zeros(4, dtype=torch.float64)
    for p, y in zip(predictions.probs.mT, _one_hot(predictions).mT, strict=True):
        index = bin_of(p)
        count = torch.bincount(index, minlength=ECE_BINS).clamp_min(1)
        p_bar, y_bar = (torch.bincount(index, x, minlength=ECE_BINS) / count for x in (p, y))
        p_in, y_in, rate = p_bar[index], y_bar[index], y.mean()
        variance, covariance = (p - p_in).square().mean(), ((p - p_in) * (y - y_in)).mean()
        parts += torch.stack(
            [
                (p_in - y_in).square().mean(),
                (y_in - rate).square().mean(),
                rate * (1 - rate),
                variance - 2 * covariance,
            ]
        )
    reliability, resolution, uncertainty, within = parts.tolist()
    return reliability, resolution, uncertainty, within


def smooth_ece(confidence: Tensor, outcome: Tensor) -> float:
    r"""Smooth expected calibration error (Blasiok and Nakkiran 2024, "Smooth ECE", definition 3).

    With r(t) = 1/n sum of K_s(t, f_i) (y_i - f_i), K_s the Gaussian kernel of width s reflected at 0 and 1, it is the
    width s at which the integral of |r| over [0, 1] equals s: there is one, as the integral falls with s.

    Args:
        confidence: f [n] fp64 in [0, 1].
        outcome: y [n], 0 or 1.
    """
    mesh = (torch.arange(_MESH, dtype=torch.float64) + 0.5) / _MESH
    residual = (outcome - confidence) / len(confidence)

    def error(width: float) -> float:
        reach = 1 + int(4 * width)  # reflections that still count
        kernel = torch.zeros(_MESH, len(confidence), dtype=torch.float64)
        for period in range(-reach, reach + 1):
            for image in (2 * period + confidence, 2 * period - confidence):
                kernel += (-0.5 * ((mesh[:, None] - image) / width) ** 2).exp()
        kernel /= kernel.mean(0).clamp_min(1e-300)  # the mesh's own normalisation
        return float((kernel @ residual).abs().mean())

    low, high = 1e-3, 1.0
    if error(low) <= low:
        return error(low)
    while high - low > 1e-4:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if error(middle) > middle else (low, middle)
    return 0.5 * (low + high)


def auroc(negatives: Tensor, positives: Tensor) -> float:
    """Probability that a positive scores above a negative, ties for a half (Mann and Whitney 1947).

    Args:
        negatives: scores [n]: of examples in distribution, or of correct predictions.
        positives: scores [m]: of examples out of distribution, or of errors; higher is more so.

    Raises:
        ValueError: there are none of one kind.
    """
    _require_both(negatives, positives)
    ordered = negatives.double().sort().values
    below = torch.searchsorted(ordered, positives.double())
    up_to = torch.searchsorted(ordered, positives.double(), right=True)
    return float((below + up_to).double().mean() / (2 * len(ordered)))


def fpr_at_tpr(negatives: Tensor, positives: Tensor, tpr: float = 0.95) -> float:
    """Share of negatives at or above the highest threshold that finds a share `tpr` of the positives.

    Raises:
        ValueError: there are none of one kind, or `tpr` is not in (0, 1].
    """
    _require_both(negatives, positives)
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must lie in (0, 1], got {tpr}")
    ordered = positives.double().sort(descending=True).values
    found = int((torch.arange(1, len(ordered) + 1) / len(ordered) >= tpr - _TOLERANCE).int().argmax())
    return float((negatives.double() >= ordered[found]).double().mean())


def _require_both(negatives: Tensor, positives: Tensor) -> None:
    if not len(negatives) or not len(positives):
        raise ValueError(
            f"separation needs examples of both kinds, got {len(negatives)} negatives, {len(positives)} positives"
        )


def _one_hot(predictions: Judged) -> Tensor:
    classes = predictions.probs.shape[1]
    return torch.nn.functional.one_hot(predictions.known_labels, classes).double()
