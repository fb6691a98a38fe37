"""Training-free Bayesianisation of an adapter (Shi et al. 2024, "Training-Free Bayesianization for Low-Rank Adapters").

With the singular values of lora_B = U diag(d) V^T the adapter is B' A', B' = U diag(d), A' = V^T A, and the weights are
drawn as A'_ij ~ N(V^T A, (sigma / d_i)^2): the product then has the covariance sigma^2 U U^T of each of its columns,
isotropic in the column space of B. The width sigma is the largest at which the NLL of an anchor set, of the mean
probabilities of the draws, rises by no more than a share of what it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from laplace_lora_fast.baselines.base import Baseline, Case, Predict, averaged, logits
from laplace_lora_fast.evaluation.predictions import Predictions
from laplace_lora_fast.fitting.passes import Loader
from laplace_lora_fast.model.lora import LoraLayer, lora_layers
from laplace_lora_fast.options import positive_integer, positive_number


@dataclass(frozen=True)
class TrainingFree(Baseline):
    """Draws of the adapter's product, as wide as held-out data bear.

    Args:
        samples: draws behind a prediction.
        tolerance: by which share the held-out NLL may rise.
        largest: width up to which is searched.
        steps: of the bisection, after doubling from `largest` / 2^10.
    """

    samples: int = 10
    tolerance: float = 0.003
    largest: float = 1.0
    steps: int = 8

    needs_held_out = True

    def __post_init__(self) -> None:
        for name in ("samples", "steps"):
            object.__setattr__(self, name, positive_integer(name, getattr(self, name)))
        for name in ("tolerance", "largest"):
            object.__setattr__(self, name, positive_number(name, getattr(self, name)))

    def fit(self, case: Case) -> Predict:
        layers = lora_layers(case.model, case.task.head(case.model))
        width = self.width(case, layers)
        return lambda loader: self._predicted(case, layers, width, loader)

    def width(self, case: Case, layers: Sequence[LoraLayer]) -> float:
        """Sigma: doubled while the anchor set bears it, then bisected; 0 where it bears none."""
        anchor = case.known_held_out

        def nll(width: float) -> float:
            return self._predicted(case, layers, width, anchor).metrics().nll

        bound = nll(0.0) * (1 + self.tolerance)
        widths = [0.0, *(self.largest * 2.0 ** (power - 10) for power in range(11))]
        failing = (pair for pair in pairwise(widths) if nll(pair[1]) > bound)
        low, high = next(failing, (self.largest, self.largest))
        if low == high:
            return self.largest
        for _ in range(self.steps):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if nll(middle) <= bound else (low, middle)
        return low

    def _predicted(
        self, case: Case, layers: Sequence[LoraLayer], width: float, loader: Loader
    ) -> Predictions:
        def draws() -> Iterator[tuple[Tensor, Tensor | None]]:
            if not width:
                yield logits(case.model, case.task, loader)
                return
            generator = torch.Generator().manual_seed(case.seed)  # the same draws at every width
            for _ in range(self.samples):
                with moved(layers, [noise(layer, width, generator) for layer in layers]):
                    yield logits(case.model, case.task, loader)

        return averaged(draws())


def noise(layer: LoraLayer, width: float, generator: torch.Generator) -> Tensor:
    """A step of lora_A [r, d_in] whose image under lora_B is `width` U Z, Z standard normal.

    Directions that lora_B does not use have no image, and no step.
    """
    b = layer.weights.B.double()
    _, d, vt = torch.linalg.svd(b, full_matrices=False)
    used = d > torch.finfo(layer.weights.B.dtype).eps * d[0]
    z = torch.randn(len(d), layer.weights.d_in, generator=generator, dtype=torch.float64).to(b.device)
    step: Tensor = width * vt.mT @ torch.where(used[:, None], z / d[:, None], 0)
    return step


@contextmanager
def moved(layers: Sequence[LoraLayer], steps: Sequence[Tensor]) -> Iterator[None]:
    """The layers with these steps added to lora_A's outputs, in hooks: no weight is written."""

    def added(step: Tensor) -> object:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + args[0] @ step.mT.to(args[0])

        return add

    handles = [
        layer.adapter_parts[0].register_forward_hook(added(step))  # type: ignore[arg-type]
        for layer, step in zip(layers, steps, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
