"""What a likelihood is asked for: from outputs and targets to log-likelihood and Fisher, from Gaussians to answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError


class Likelihood(ABC):
    """p(y | f) for a batch of outputs f [N, C]. A plug: one file, one `register` line, one contract test.

    Attributes:
        name: as in laplace-torch, "classification" or "regression", or a name of its own.
        links: names of the ways from a Gaussian over functions to an answer, the default first; none where the answer
            is the Gaussian itself.
        needs_samples: those of `links` that take a number of samples.
        noise: its standard deviation where it was given; None where there is none or it is to be tuned.
        gives_classes: whether answers are distributions over classes, so that rows sum to one.
        has_noise: whether there is a noise scale, by whose square the curvature at unit noise is divided.
        sampled: whether the outputs are scores of labels that the head has drawn from the model: the curvature is then
            an estimate, and there is no evidence, no refit, no answer but by samples of the weights.
    """

    name: ClassVar[str]
    links: ClassVar[Sequence[str]] = ()
    needs_samples: ClassVar[Sequence[str]] = ()
    gives_classes: ClassVar[bool] = False
    has_noise: ClassVar[bool] = False
    sampled: ClassVar[bool] = False
    noise: float | None = None

    @property
    def is_unit(self) -> bool:
        """Whether it is a Gaussian whose Hessian at unit noise is the identity."""
        return False

    def check(self, outputs: Tensor) -> None:
        """Raises InvalidBatchError where C does not fit the likelihood; any does here."""

    @abstractmethod
    def targets(self, labels: Tensor | None, outputs: Tensor, checks: DeferredChecks) -> Tensor | None:
        """Labels in the form the other methods take, a copy; raises InvalidBatchError where they do not fit."""

    @abstractmethod
    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum over the batch of log p(y | f), fp64 scalar, without terms in the noise scale."""

    @abstractmethod
    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient [N, C] of -log p(y | f) in f."""

    @abstractmethod
    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Targets drawn from p(y | f)."""

    @abstractmethod
    def hessian_root(self, outputs: Tensor) -> Tensor:
        """S [N, C, K] with S S^T the Hessian of -log p(y | f) in f and K its rank."""

    def functions(self, outputs: int) -> Tensor:
        """L [C, K] with f L all that the likelihood sees of f: contrasts, or, as here, the outputs themselves."""
        return torch.eye(outputs)

    def from_functions(self, functions: Tensor) -> Tensor:
        """Outputs [.., N, C] with these functions [.., N, K]."""
        return functions

    @abstractmethod
    def answer(
        self, mean: Tensor, cov: Tensor, link: str | None, n_samples: int, generator: torch.Generator
    ) -> Tensor:
        """The prediction [.., N, C] for functions ~ N(mean [.., N, K], cov [.., N, K, K])."""

    @abstractmethod
    def plain_answer(self, outputs: Tensor) -> Tensor:
        """The prediction [N, C] of outputs [N, C] without uncertainty."""

    @abstractmethod
    def score(
        self,
        mean: Tensor,
        cov: Tensor,
        targets: Tensor,
        link: str | None,
        n_samples: int,
        generator: torch.Generator,
        noise: float | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mean over examples of -log p(y) under G predictions, fp64 [G].

        Args:
            mean: of the functions, [(G,) N, K].
            cov: [G, N, K, K].
            targets: of the examples.
            link: one of `links`, or None for the default.
            n_samples: of a link that samples.
            generator: of a link that samples.
            noise: in force; None for the best under each prediction, where there is a noise, mean and cov being those
                at unit noise then.

        Returns:
            The scores, and the best noise [G] where it was left open.
        """

    def noise_variance(self, noise: float, like: Tensor) -> Tensor:
        """Variance of each output's noise, [C] or a scalar, where there is a noise."""
        return like.new_tensor(noise**2)

    def judged_by(self, targets: Tensor) -> Tensor:
        """The labels that answers are compared with: the targets themselves here."""
        return targets

    def uncertainty(
        self, mean: Tensor, cov: Tensor, n_samples: int | None, generator: torch.Generator, noise: float
    ) -> tuple[Tensor, Tensor]:
        """Total and aleatoric uncertainty of the answers, fp64 [N, ..]; their difference is the epistemic one.

        Args:
            mean: of the functions, [N, K].
            cov: [N, K, K].
            n_samples: points that stand for the Gaussian; None for the default, or where the result is in closed form.
            generator: of the points.
            noise: in force, 1 where there is none.

        Raises:
            ValueError: this likelihood takes its uncertainty apart in no way.
        """
        raise ValueError(f"{self!r} does not say what is aleatoric: give it a method 'uncertainty'")

    def functions_root(self, outputs: Tensor) -> Tensor:
        """Root [N, K, K] of the Hessian in the functions."""
        root = self.hessian_root(outputs)
        return root[:, root.shape[1] - root.shape[2] :]


def one_label_per_output(labels: Tensor, outputs: Tensor, kind: str) -> Tensor:
    """Labels [N, C], or [N] where C = 1, in the shape of the outputs; raises InvalidBatchError for any other.

    `kind` says what they are: "zeros and ones".
    """
    if labels.shape != outputs.shape and (labels.shape != outputs.shape[:1] or outputs.shape[1] != 1):
        raise InvalidBatchError(
            f"'labels' have shape {tuple(labels.shape)}, expected {tuple(outputs.shape)} {kind}"
        )
    return labels.reshape(outputs.shape)
