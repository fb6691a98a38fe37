"""Using predictions where they can be trusted: abstention, risk at a coverage, conformal sets, OOD scores.

Ragged options: classes of probability zero, which `predictions` puts behind an example's last option, are in no set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_lora_fast.evaluation.metrics import Judged
from laplace_lora_fast.options import check_choice

SCORES = ("confidence", "entropy")
METHODS = ("threshold", "adaptive")


def ood_score(predictions: Judged, kind: str = "entropy") -> Tensor:
    """How unlike the training data an example looks, [N]: higher is more unlike.

    Args:
        predictions: of any examples.
        kind: "entropy" of the predictive distribution, in nats, or "confidence": one minus the largest probability
            (Hendrycks and Gimpel 2017). `la.uncertainty(batch).epistemic` is a third, by the posterior.

    Raises:
        ValueError: `kind` is neither.
    """
    check_choice("kind", kind, SCORES)
    if kind == "confidence":
        return 1 - predictions.confidence
    entropy: Tensor = torch.special.entr(predictions.probs).sum(1)
    return entropy


@dataclass(frozen=True)
class AbstentionCurve:
    """Errors among the examples that are answered, from the surest one alone to all of them.

    Attributes:
        coverage: shares of examples answered, ascending to 1, [M]: one for each distinct score, so that examples alike
            are answered or left together.
        risk: share of errors among those, [M].
        threshold: the largest score answered, [M].
    """

    coverage: Tensor
    risk: Tensor
    threshold: Tensor

    @property
    def area(self) -> float:
        """The mean risk over coverages from 0 to 1 (AURC; Geifman, Uziel and El-Yaniv 2019); less is better."""
        width = torch.diff(self.coverage, prepend=self.coverage.new_zeros(1))
        return float((self.risk * width).sum())

    def risk_at(self, coverage: float) -> float:
        """The risk where at least this share is answered.

        Raises:
            ValueError: `coverage` is not in (0, 1].
        """
        return float(self.risk[self._at(coverage)])

    def threshold_at(self, coverage: float) -> float:
        """The score up to which at least this share is answered: abstain above it."""
        return float(self.threshold[self._at(coverage)])

    def coverage_at(self, risk: float) -> float:
        """The largest share that can be answered at no more than this risk on these examples; 0 where there is none."""
        met = self.risk <= risk
        return float(self.coverage[met].max()) if met.any() else 0.0

    def _at(self, coverage: float) -> int:
        if not 0 < coverage <= 1:
            raise ValueError(f"coverage must lie in (0, 1], got {coverage}")
        return int((self.coverage >= coverage - 1e-12).int().argmax())


def abstention_curve(predictions: Judged, scores: Tensor | None = None) -> AbstentionCurve:
    """Abstains on the examples with the highest scores first.

    Args:
        predictions: with labels.
        scores: of unsureness, [N]; None for one minus the confidence.

    Raises:
        ValueError: there are no labels, or `scores` has another shape or is not finite.
    """
    wrong = ~predictions.correct
    unsure = ood_score(predictions, "confidence") if scores is None else scores.detach().cpu().double()
    if unsure.shape != wrong.shape or not unsure.isfinite().all():
        raise ValueError(f"scores must be {len(wrong)} finite numbers, got shape {tuple(unsure.shape)}")
    order = unsure.argsort(stable=True)
    ranked, errors = unsure[order], wrong[order].double().cumsum(0)
    last = torch.cat([ranked[1:] > ranked[:-1], torch.tensor([True])])  # of those alike
    count = torch.arange(1, len(ranked) + 1, dtype=torch.float64)
    return AbstentionCurve((count / len(ranked))[last], (errors / count)[last], ranked[last])


@dataclass(frozen=True)
class ConformalSets:
    """Sets of classes that hold the label with a stated probability.

    Attributes:
        members: [N, C] bool.
        level: 1 - alpha.
        threshold: of the score up to which a class is in the set; infinite where the calibration examples are too few,
            so that all classes are.
        labels: [N] or None.
    """

    members: Tensor
    level: float
    threshold: float
    labels: Tensor | None = None

    @property
    def size(self) -> Tensor:
        """Classes in each set, [N]."""
        return self.members.sum(1)

    @property
    def coverage(self) -> float:
        """Share of examples whose set holds the label. Raises ValueError without labels."""
        if self.labels is None:
            raise ValueError("there are no labels to judge by: pass batches with 'labels'")
        return float(self.members.gather(1, self.labels[:, None]).double().mean())


def conformal_sets(
    calibration: Judged, predictions: Judged, alpha: float = 0.1, method: str = "threshold"
) -> ConformalSets:
    """Split-conformal prediction: sets that hold the label with probability at least 1 - alpha.

    That holds on average over draws of the calibration and the new examples, whatever the model, as long as they are
    exchangeable: not out of distribution, and not where the calibration examples chose the prior precision.

    Args:
        calibration: labelled predictions of examples that neither trained nor tuned anything.
        predictions: those that get sets.
        alpha: how often the label may be missed, in (0, 1).
        method: "threshold": classes whose probability is large enough, the smallest sets on average (Sadinle, Lei and
            Wasserman 2019). "adaptive": the likeliest classes as long as those before them have not enough together,
            larger where the model is unsure, and never empty (Romano, Sesia and Candes 2020; without their
            randomisation, so that sets are somewhat too large).

    Raises:
        ValueError: an argument is not one of its choices, or there are no calibration labels.
    """
    check_choice("method", method, METHODS)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
    scores = _nonconformity(calibration.probs, method)
    of_label = scores.gather(1, calibration.known_labels[:, None])[:, 0].sort().values
    rank = math.ceil((len(of_label) + 1) * (1 - alpha) - 1e-9)  # of the quantile; a hair off from rounding
    threshold = float(of_label[rank - 1]) if rank <= len(of_label) else math.inf
    members = _nonconformity(predictions.probs, method) <= threshold
    members &= predictions.probs > 0
    return ConformalSets(members, 1 - alpha, threshold, predictions.labels)


def _nonconformity(probs: Tensor, method: str) -> Tensor:
    """How little each class conforms, [N, C]."""
    if method == METHODS[0]:
        return 1 - probs
    order = probs.argsort(dim=1, descending=True, stable=True)
    sorted_probs = probs.gather(1, order)
    before = (sorted_probs.cumsum(1) - sorted_probs).clamp_min(0)
    return torch.empty_like(probs).scatter_(1, order, before)
