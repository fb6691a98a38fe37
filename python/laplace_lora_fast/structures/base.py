"""What every structure of the curvature offers, and how one is plugged in.

A curvature is H, the Hessian of the negative log-likelihood in all LoRA weights at the MAP estimate, in the form its
structure keeps it. Prior precisions are one number a weight (lora_A or lora_B of one layer), passed to each call, so
that one fit serves any prior.

A structure is a plug: a folder or file with a `Structure` (its options, and what it needs of a fit), an `Accumulator`,
a `Curvature` and a `Predictor`, and one `register` line. Nothing else in the package knows it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from laplace_lora_fast.errors import NumericalError, StateError, UnsupportedAdapterError
from laplace_lora_fast.likelihoods import Fisher, Likelihood
from laplace_lora_fast.likelihoods.functions import Functions
from laplace_lora_fast.ranks import Ranks
from laplace_lora_fast.structures.cost import Cost
from laplace_lora_fast.structures.pads import PadImage
from laplace_lora_fast.structures.search import evidence_noise
from laplace_lora_fast.structures.state import State
from laplace_lora_fast.weights import LayerWeights, WeightName, matrices

Seen = TypeVar("Seen")


class Step(Protocol):
    """One batch between its forward pass and its backward passes."""

    @property
    def shared_inputs(self) -> list[int]:
        """For each layer the first layer that is fed by the same tensor."""

    @property
    def functions(self) -> Functions:
        """What the examples' functions are of the sequences' outputs."""

    @property
    def u(self) -> Tensor:
        """What the model gives for every sequence, [S, U], detached."""

    @property
    def outputs(self) -> list[Tensor]:
        """Outputs [N_b, C_b] of every block of examples, detached."""

    @property
    def targets(self) -> list[Tensor] | None:
        """Targets of every block, or None for a batch without labels."""

    def fisher(self, fisher: Fisher) -> list[Tensor]:
        """Fisher cotangents [N_b, C_b, K_b] of every block's outputs."""

    def prior_u(self) -> Tensor:
        """`u` with the adapter switched off: one more forward pass."""


class Listener(ABC):
    """What a pass over data shows its streams to. Called without autograd and autocast."""

    takes_jacobians = False  # whether it can do with those of layers that have no streams

    @abstractmethod
    def start(self, step: Step) -> Tensor:
        """After the forward pass of a batch. Returns the cotangents [S, U, P] of u to send back, one pass each."""

    @abstractmethod
    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> PadImage | None:
        """Input x [S, T, d_in] of all layers of `group`; mask [S, T] or None. Returns what it tells of pads."""

    @abstractmethod
    def observe_gradient(self, layer: int, g: Tensor, mask: Tensor | None) -> PadImage | None:
        """Gradient g [S, T, d_out] at the output of a layer, with its mask. Returns as above, until the next pass."""

    def observe_alignment(self, layer: int, aligned: Tensor) -> None:
        """Of a layer with DoRA, before its gradient: sum_t g_t * (y_t - b), feature by feature, [S, d_out].

        Raises:
            UnsupportedAdapterError: this listener is for plain layers.
        """
        raise UnsupportedAdapterError(
            f"{type(self).__name__} cannot treat DoRA, whose norm is no sum over tokens: take structure=Rows() or "
            "Diagonal(), which form whole Jacobians, or leave the DoRA layers out with layers=lambda name: .."
        )

    def observe_jacobians(self, layer: int, jacobians: Sequence[Tensor]) -> None:
        """Instead of streams, where it `takes_jacobians`: of every weight of a layer [S, r, d], one a sequence."""
        raise NotImplementedError

    def observe_parameters(self, gradients: Sequence[Tensor | None]) -> None:
        """Gradients of parameters in this backward pass, where a run was asked for them."""

    def finish_pass(self) -> None:
        """After each backward pass."""

    def finish(self) -> None:
        """After the last backward pass of a batch."""

    def forget(self) -> None:
        """Drops what is held of the current batch, which has failed or is over."""


class Accumulator(Listener):
    """Listener that makes something of the Fisher-weighted streams of all batches: in the end a curvature.

    `start` takes nothing in that `forget` does not drop again: a batch of which nothing but that was shown has left no
    trace, and its streams may be shown after `start` as well as before it.
    """

    def state(self) -> State:
        """What it holds between two batches, before `join`. Tensors are its own: to be read at once.

        Raises:
            StateError: this kind cannot be interrupted.
        """
        raise StateError(
            f"{type(self).__name__} has no state to write: fit without checkpoint, or give it state() and restore()"
        )

    def restore(self, state: State) -> None:
        """Takes over what `state` gave, in an empty accumulator made with the same arguments."""
        raise NotImplementedError

    def prepare(self, shared_inputs: list[int]) -> None:
        """Before `join` on a rank without a batch: becomes as empty as one that has seen some can be."""

    @abstractmethod
    def join(self, ranks: Ranks) -> None:
        """After the last batch: takes in what the other ranks have accumulated."""

    @abstractmethod
    def result(self) -> Any:
        """After `join`. Raises NumericalError if something is not finite."""


class Predictor(Listener, Generic[Seen]):
    """Listener that turns batches into Gaussians of their functions under G priors: first look, then conclude."""

    together: int = 1  # of how many functions at least it had better conclude at once

    @abstractmethod
    def seen(self) -> list[Seen]:
        """After `finish`: what `gaussians` needs of every block of the batch's examples."""

    @abstractmethod
    def gaussians(self, groups: Sequence[Sequence[Seen]]) -> list[tuple[Tensor, Tensor]]:
        """For each group mean [N, K] ([G, N, K] where it depends on the prior) and covariance [G, N, K, K].

        Args:
            groups: of what `seen` gave, over any number of batches, those of one K in one group. For several priors,
                call it once for all: priors are solved for one after the other.
        """


class Curvature(ABC):
    """H of all LoRA weights, in numbers alone.

    Attributes:
        names: of the weights, in their order.
        means: the MAP value [r, d] of every weight.
    """

    names: list[WeightName]
    means: list[Tensor]

    @abstractmethod
    def scaled(self, factor: float) -> Curvature:
        """The curvature `factor` times this one."""

    @abstractmethod
    def whitened_spectrum(self, prior_precision: Tensor) -> tuple[Tensor, Tensor]:
        """Non-zero eigenvalues of Lambda^-1/2 H Lambda^-1/2 and their multiplicities, fp64 on the CPU.

        Args:
            prior_precision: Lambda's diagonal, one value a weight, fp64 [n_weights].
        """

    @abstractmethod
    def effective_parameters(self, prior_precision: Tensor) -> Tensor:
        """MacKay's number of determined parameters of every weight, tr(H (H + Lambda)^-1), fp64 [n_weights]."""

    @abstractmethod
    def maximise_evidence(self, keys: Sequence[str], squared_norms: Sequence[float]) -> dict[str, float]:
        """The prior precision of each group of weights that maximises the marginal likelihood.

        Args:
            keys: for each weight the key of its group.
            squared_norms: ||theta - prior mean||^2 of each weight.

        Raises:
            NumericalError: the evidence has no maximum; names the group.
        """

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator, prior_precision: Tensor) -> list[Tensor]:
        """Draws n values of every weight, each [n, r, d], jointly."""

    def sample_span(self, n: int, generator: torch.Generator, prior_precision: Tensor) -> list[Tensor]:
        """As `sample`, but moves in the span of the training data's Jacobian rows only. ValueError without rows."""
        raise ValueError("directions='data' needs the rows of the training data: fit with Rows()")

    @abstractmethod
    def covariance(self, weight: int, prior_precision: Tensor) -> Tensor:
        """Dense covariance [P, P] fp64 of the flattened parameter of one weight."""

    @abstractmethod
    def damaged(self) -> list[int]:
        """Weights whose tensors are not finite or have shapes that do not belong together, as from a damaged file."""

    @abstractmethod
    def describe(self) -> list[dict[str, str]]:
        """For each weight what the summary shows of it: column -> text; the same columns for all."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that `Structure.rebuild` needs beside the names."""

    def notes(self, prior_precision: Tensor) -> list[str]:
        """Lines of the summary about all weights together, as how good an approximation is."""
        return []

    def dense_factors(self) -> list[tuple[Tensor, Tensor]]:
        """For each weight [r, d] its Kronecker factors ([r, r], [d, d]). Raises ValueError where there are none."""
        raise ValueError(f"{type(self).__name__} has no Kronecker factors: fit with KFAC()")

    def maximise_evidence_with_noise(self, keys: Sequence[str]) -> tuple[dict[str, float], float] | None:
        """The prior precision of each group and the noise, where both are the curvature's own to say; else None."""
        return None

    def best_noise(self, prior_precision: Tensor, residuals: float, count: int) -> float:
        """The noise that maximises a regression's evidence, from its sum of squared residuals and their number."""
        return evidence_noise(*self.whitened_spectrum(prior_precision), residuals, count)

    def log_det_ratio(self, prior_precision: Tensor) -> Tensor:
        """logdet(H + Lambda) - logdet Lambda, fp64 scalar."""
        values, counts = self.whitened_spectrum(prior_precision)
        return (counts * values.log1p()).sum()

    def log_marginal_likelihood(
        self, prior_precision: Tensor, log_likelihood: float, penalty: float
    ) -> Tensor:
        """Laplace's estimate, fp64 scalar.

        Args:
            prior_precision: fp64 [n_weights].
            log_likelihood: of the trained model.
            penalty: sum over weights of lambda ||theta - prior mean||^2.
        """
        return log_likelihood - 0.5 * (penalty + self.log_det_ratio(prior_precision))


class Ability(str, Enum):
    """What a structure can do beside predicting; what is missing is refused by name."""

    SAMPLES = "samples"  # weights drawn from the posterior
    FACTORS = "factors"  # Kronecker factors
    LEAVE_ONE_OUT = "leave_one_out"  # predictions of training examples without them


@dataclass(frozen=True)
class Problem:
    """What a structure is told before the first pass.

    Attributes:
        layers: their weights.
        likelihood: of the outputs.
        budget: bytes.
        seed: of everything random.
        ranks: over which the data are spread.
        n_examples: N over all ranks; None where a loader does not tell.
        n_functions: sum over examples of K; None likewise.
        shared_inputs: for each layer the first layer that is fed by the same tensor, where that is known: it is found
            out in the first pass.
    """

    layers: Sequence[LayerWeights]
    likelihood: Likelihood
    budget: int
    seed: int
    ranks: Ranks
    n_examples: int | None = None
    n_functions: int | None = None
    shared_inputs: Sequence[int] | None = None

    @property
    def n_parameters(self) -> int:
        return sum(weight.numel() for weight in matrices(self.layers))


@dataclass(frozen=True)
class Stage:
    """One pass over the training data.

    Attributes:
        name: of its progress bar.
        accumulator: makes an empty one from the result of the stage before, None before the first.
        first_batch_only: whether the pass ends after the first batch of the first rank.
    """

    name: str
    accumulator: Callable[[Any], Accumulator]
    first_batch_only: bool = False


@dataclass(frozen=True)
class Verdict:
    """Whether a structure suits a problem, and why."""

    suits: bool
    reason: str


class Structure(ABC):
    """Options of a structure, and what it needs of a fit. Derived classes are registered frozen dataclasses.

    Attributes:
        preference: structure="auto" takes the first that suits, in ascending order of this; None: only when asked for.
        abilities: what it can do beside predicting.
        uses_budget: whether it looks at the memory budget.
        needs_size: whether its options follow the number of rows, so that the first batch is looked at to tell it.
        starts_without_adapter: whether it takes the model without its adapter for the prior's function.
    """

    preference: ClassVar[int | None] = None
    fisher: Fisher

    @property
    def abilities(self) -> frozenset[Ability]:
        return frozenset()

    @property
    def uses_budget(self) -> bool:
        return False

    @property
    def needs_size(self) -> bool:
        return False

    @property
    def starts_without_adapter(self) -> bool:
        return False

    @abstractmethod
    def suits(self, problem: Problem) -> Verdict:
        """Whether "auto" may choose it."""

    def adapted_to(self, problem: Problem) -> Structure:
        """The options with which "auto" takes it: its defaults, unless the problem asks for others."""
        return self

    def cost(self, problem: Problem) -> Cost | None:
        """What it takes of a machine; None where that cannot be said of this problem, or not at all."""
        return None

    @abstractmethod
    def stages(self, problem: Problem) -> list[Stage]:
        """The passes over the training data; the last one's result is the curvature."""

    @abstractmethod
    def predictor(
        self, curvature: Any, layers: Sequence[LayerWeights], prior_precisions: Tensor
    ) -> Predictor[Any]:
        """A listener for Gaussians under G priors, `prior_precisions` fp64 [n_weights, G]."""

    def left_out(self, curvature: Any) -> Callable[[float], list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
        """Predictions of examples without them: prior precision -> examples, mean, covariance, targets of every block.

        Raises:
            ValueError: this structure has no `Ability.LEAVE_ONE_OUT`.
        """
        raise ValueError(f"{self!r} cannot leave training examples out")

    @abstractmethod
    def rebuild(
        self,
        names: list[WeightName],
        tensors: dict[str, Tensor],
        devices: Sequence[torch.device],
        likelihood: Likelihood,
    ) -> Curvature:
        """The curvature of `Curvature.tensors`, every weight on its device. Raises KeyError for a missing tensor."""


def require_finite(names: Sequence[WeightName], tensors: Sequence[Tensor], what: str) -> None:
    """Raises NumericalError for the first weight whose tensor is not finite; names its layer."""
    for name, tensor in zip(names, tensors, strict=True):
        if not tensor.isfinite().all():
            raise NumericalError(
                f"the {what} of layer {name.layer!r} is not finite: the model overflows or a batch holds NaN. "
                "Load the model in bfloat16 or float32, or pad on the other side"
            )
