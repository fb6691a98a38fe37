"""What every structure of the curvature offers: the few questions a Laplace posterior asks of it.

A curvature is H, the Hessian of the negative log-likelihood in all LoRA weights at the MAP estimate, in the form its
structure keeps it. Prior precisions are one number per block (lora_A or lora_B of one layer), passed to each call, so
that one fit serves any prior.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from laplace_lora_fast.errors import NumericalError
from laplace_lora_fast.heads import Inputs
from laplace_lora_fast.taps import Observer, Site, Tap

BlockName = tuple[str, str]  # layer, side


class Predictor(Observer, Protocol):
    """Observer that turns one batch into logits and their covariance under G priors."""

    def run(self, tap: Tap, inputs: Inputs, cotangents: Tensor) -> tuple[Tensor, Tensor]:
        """One forward and K backward passes over a batch.

        Args:
            tap: entered, with this predictor as its observer.
            inputs: the batch.
            cotangents: [C, K], the directions of the outputs to look at.

        Returns:
            Logits [N, C] and covariances [G, N, K, K] of `logits @ cotangents`.
        """


class Curvature(ABC):
    """H of all LoRA weights.

    Attributes:
        structure: its name in the API.
        names: (layer, "A" or "B") of every block, A before B, layer by layer.
        means: the MAP weight of every block, [r, d]: lora_A as it is, lora_B transposed.
    """

    structure: str
    names: list[BlockName]
    means: list[Tensor]

    @abstractmethod
    def scaled(self, factor: float) -> Curvature:
        """The curvature `factor` times this one."""

    @abstractmethod
    def whitened_spectrum(self, prior_precision: Tensor) -> tuple[Tensor, Tensor]:
        """Non-zero eigenvalues of Lambda^-1/2 H Lambda^-1/2 and their multiplicities, fp64 on the CPU.

        Args:
            prior_precision: Lambda's diagonal, one value per block, fp64 [n_blocks].
        """

    @abstractmethod
    def effective_parameters(self, prior_precision: Tensor) -> Tensor:
        """MacKay's number of determined weights of every block, tr(H (H + Lambda)^-1), fp64 [n_blocks]."""

    @abstractmethod
    def maximise_evidence(self, keys: Sequence[str], squared_norms: Sequence[float]) -> dict[str, float]:
        """The prior precision of each group of blocks that maximises the marginal likelihood.

        Args:
            keys: for each block the key of its group.
            squared_norms: ||theta - prior mean||^2 of each block.

        Raises:
            NumericalError: the evidence has no maximum; names the group.
        """

    @abstractmethod
    def predictor(self, sites: Sequence[Site], prior_precisions: Tensor, n_cotangents: int) -> Predictor:
        """An observer for covariances under G priors, `prior_precisions` fp64 [n_blocks, G]."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator, prior_precision: Tensor) -> list[Tensor]:
        """Draws n weights of every block, each [n, r, d], jointly."""

    @abstractmethod
    def covariance(self, block: int, prior_precision: Tensor) -> Tensor:
        """Dense covariance [P, P] fp64 of vec(weight) of one block, row-major in the weight's own orientation."""

    @abstractmethod
    def describe(self) -> list[tuple[int, float]]:
        """For each block the rank its curvature is kept at and the fraction of the trace in it."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything `from_tensors` needs beside the structure and the names."""

    @classmethod
    @abstractmethod
    def from_tensors(
        cls, structure: str, names: list[BlockName], tensors: dict[str, Tensor], devices: Sequence[torch.device]
    ) -> Curvature:
        """Rebuilds a curvature with every block on its device. Raises KeyError for a missing tensor."""

    def log_det_ratio(self, prior_precision: Tensor) -> Tensor:
        """logdet(H + Lambda) - logdet Lambda, fp64 scalar."""
        values, counts = self.whitened_spectrum(prior_precision)
        return (counts * values.log1p()).sum()


def evidence_root(values: Tensor, counts: Tensor, distance: float, group: str) -> float:
    """The prior precision lambda at which lambda ||theta - mean||^2 = gamma(lambda), the maximum of the evidence.

    Args:
        values: eigenvalues of H in the group's weights, fp64.
        counts: their multiplicities.
        distance: ||theta - mean||^2.
        group: named in errors.

    Raises:
        NumericalError: there is no maximum.
    """
    where = f" of group {group!r}" if group else ""
    if not distance > 0:
        raise NumericalError(f"the LoRA weights{where} equal the prior mean: the evidence has no maximum; train first")
    determined = float((counts * (values > 0)).sum())
    if not determined > 0:
        raise NumericalError(f"the curvature{where} is zero: the evidence has no maximum")

    def gap(log_lambda: float) -> tuple[float, float]:
        lam = math.exp(log_lambda)
        share = values / (values + lam)
        gamma = float((counts * share).sum())
        slope = float((counts * share * (1 - share)).sum())
        return lam * distance - gamma, lam * distance + slope

    return math.exp(increasing_root(gap, math.log(determined / distance)))


def evidence_noise(curvature: Curvature, prior_precision: Tensor, residuals: float, count: int) -> float:
    """The noise standard deviation that maximises the evidence at a given prior.

    Root of residuals / sigma^2 = count - gamma(sigma), which has exactly one.

    Args:
        curvature: at unit noise.
        prior_precision: of each block.
        residuals: sum of squared residuals.
        count: number of scalar observations.
    """
    values, counts = curvature.whitened_spectrum(prior_precision)

    def gap(log_variance: float) -> tuple[float, float]:
        share = 1 / (1 + math.exp(log_variance) / values)
        gamma, slope = float((counts * share).sum()), float((counts * share * (1 - share)).sum())
        misfit = residuals * math.exp(-log_variance)
        return count - gamma - misfit, slope + misfit

    return math.exp(increasing_root(gap, math.log(residuals / count)) / 2)


def increasing_root(function: Callable[[float], tuple[float, float]], start: float) -> float:
    """Root of an increasing function given with its derivative: Newton, kept inside a bracket.

    Args:
        function: x -> (value, derivative).
        start: where to begin.

    Raises:
        NumericalError: there is no root within 200 of `start`.
    """
    low, high, x = -math.inf, math.inf, start
    for _ in range(200):
        value, slope = function(x)
        low, high = (x, high) if value < 0 else (low, x)
        step = min(max(-value / slope, -5.0), 5.0) if slope > 0 else math.copysign(5.0, -value)
        following = x + step
        if not low < following < high:
            following = (low + high) / 2 if math.isfinite(low + high) else x + step
        if abs(following - x) <= 1e-14 * max(1.0, abs(x)) or following in (low, high) or value == 0:
            return x
        if abs(following - start) > 200:
            raise NumericalError("the evidence has no maximum for a prior precision between 1e-86 and 1e86")
        x = following
    return x
