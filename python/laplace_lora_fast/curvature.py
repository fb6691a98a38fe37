"""What every structure of the curvature offers: the few questions a Laplace posterior asks of it.

A curvature is H, the Hessian of the negative log-likelihood in all LoRA weights at the MAP estimate, in the form its
structure keeps it. Prior precisions are one number per block (lora_A or lora_B of one layer), passed to each call, so
that one fit serves any prior.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from laplace_lora_fast.heads import Inputs
from laplace_lora_fast.streams import Observer
from laplace_lora_fast.taps import Site, Tap

BlockName = tuple[str, str]  # layer, side
Seen = TypeVar("Seen")


class Predictor(Observer, Protocol[Seen]):
    """Observer that turns batches into Gaussians of their outputs under G priors: first look, then conclude."""

    def run(self, tap: Tap, inputs: Inputs, cotangents: Tensor) -> tuple[Tensor, Seen]:
        """One forward and K backward passes over a batch.

        Args:
            tap: entered, with this predictor as its observer.
            inputs: the batch.
            cotangents: [C, K], the directions of the outputs to look at.

        Returns:
            Logits [N, C] of the model, and what `gaussians` needs of the batch.
        """

    def gaussians(self, batches: Sequence[Seen]) -> tuple[Tensor, Tensor]:
        """Mean [N, K] ([G, N, K] where it depends on the prior) and covariances [G, N, K, K] of logits @ cotangents.

        Args:
            batches: what `run` saw; N counts all of their examples. For several priors, call it once for all batches.
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
    def predictor(self, sites: Sequence[Site], prior_precisions: Tensor, n_cotangents: int) -> Predictor[Any]:
        """An observer for covariances under G priors, `prior_precisions` fp64 [n_blocks, G]."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator, prior_precision: Tensor) -> list[Tensor]:
        """Draws n weights of every block, each [n, r, d], jointly."""

    @abstractmethod
    def covariance(self, block: int, prior_precision: Tensor) -> Tensor:
        """Dense covariance [P, P] fp64 of vec(weight) of one block, row-major in the weight's own orientation."""

    @abstractmethod
    def damaged(self) -> list[int]:
        """Blocks whose tensors are not finite or have shapes that do not belong together, as from a damaged file."""

    @abstractmethod
    def describe(self) -> list[tuple[int, float]]:
        """For each block the rank its curvature is kept at and the fraction of the trace in it."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything `from_tensors` needs beside the structure and the names."""

    @classmethod
    @abstractmethod
    def from_tensors(
        cls,
        structure: str,
        names: list[BlockName],
        tensors: dict[str, Tensor],
        devices: Sequence[torch.device],
    ) -> Curvature:
        """Rebuilds a curvature with every block on its device. Raises KeyError for a missing tensor."""

    def log_det_ratio(self, prior_precision: Tensor) -> Tensor:
        """logdet(H + Lambda) - logdet Lambda, fp64 scalar."""
        values, counts = self.whitened_spectrum(prior_precision)
        return (counts * values.log1p()).sum()

    def log_marginal_likelihood(
        self, prior_precision: Tensor, log_likelihood: float, penalty: float
    ) -> Tensor:
        """Laplace's estimate, fp64 scalar.

        Args:
            prior_precision: fp64 [n_blocks].
            log_likelihood: of the trained model.
            penalty: sum over blocks of lambda ||theta - prior mean||^2.
        """
        return log_likelihood - 0.5 * (penalty + self.log_det_ratio(prior_precision))
