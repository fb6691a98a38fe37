"""What an answer's uncertainty is made of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Uncertainty:
    """Uncertainty of answers, and the share that the posterior has in it.

    Of classes and options: entropies in nats, [N]. Of independent labels: entropies of each, [N, C]. Of a regression:
    variances of the targets, [N, C].

    Attributes:
        total: of the predictive distribution; fp64 on the CPU.
        aleatoric: what would be left if the weights were known: the mean over the posterior of each model's own. More
            training data does not lower it.
    """

    total: Tensor
    aleatoric: Tensor

    def __post_init__(self) -> None:
        for name in ("total", "aleatoric"):
            object.__setattr__(self, name, getattr(self, name).detach().cpu().double())

    @property
    def epistemic(self) -> Tensor:
        """What more training data would lower: total - aleatoric.

        Of entropies it is the mutual information between the answer and the weights (Houlsby et al. 2011, "Bayesian
        active learning for classification and preference learning").
        """
        return (self.total - self.aleatoric).clamp_min(0)
