"""Ways of choosing the prior precision, and with it the noise of a regression. A plug: one file and one `register`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laplace_lora_fast.fitting.fit import Fit
from laplace_lora_fast.fitting.passes import Loader
from laplace_lora_fast.likelihoods import Likelihood
from laplace_lora_fast.prediction import LinearisedModel
from laplace_lora_fast.prior.precision import PriorPrecision


@dataclass(frozen=True)
class Fitted:
    """What a way of tuning may look at.

    Attributes:
        fit: at unit noise.
        prior_mean: of each weight, or None for zero.
        likelihood: of the outputs.
        noise: in force: as given or as tuned last; None where there is none yet.
        linearised: a context with the linearised model at a noise, for passes over data.
        elsewhere: (model, loader, noise) -> a context with the linearised model of another model, fitted on this loader
            in the same way.
        dtype: of predictions.
        seed: of anything random.
    """

    fit: Fit
    prior_mean: Sequence[Tensor] | None
    likelihood: Likelihood
    noise: float | None
    linearised: Callable[[float], AbstractContextManager[LinearisedModel]]
    elsewhere: Callable[[nn.Module, Loader, float], AbstractContextManager[LinearisedModel]]
    dtype: torch.dtype
    seed: int

    @property
    def tunes_noise(self) -> bool:
        """Whether the noise is to be chosen too."""
        return self.likelihood.has_noise and self.likelihood.noise is None


@dataclass(frozen=True)
class Tuned:
    """What was chosen: the prior precision, and the noise where it was left open."""

    prior_precision: PriorPrecision
    noise: float | None = None


class Tuning(ABC):
    """A way of choosing the prior precision."""

    @abstractmethod
    def choose(self, fitted: Fitted, progress: bool) -> Tuned:
        """The choice. Raises ValueError where this way does not go with the fit."""
