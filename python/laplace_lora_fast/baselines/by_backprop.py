"""Bayesian low-rank adaptation by backpropagation (Wang et al. 2024, "BLoB"): an adapter trained with its widths.

lora_A has the variational posterior N(M_ij, G_ij^4), lora_B is a point, and the prior of lora_A is N(0, s^2). Each
batch takes a step of AdamW down the likelihood's gradient, at weights drawn for each sequence by Flipout (Wen et al.
2018), and a step of gradient descent down lambda_i KL: lambda_i = 2^i / (2^L - 1) for batch i = 0..L-1 of an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from laplace_lora_fast.baselines.base import Baseline, Case, Predict, averaged, logits, seeded
from laplace_lora_fast.baselines.training_free import moved
from laplace_lora_fast.devices import device_of
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError
from laplace_lora_fast.evaluation.predictions import Predictions
from laplace_lora_fast.fitting.passes import Loader
from laplace_lora_fast.model.lora import LoraLayer, lora_layers
from laplace_lora_fast.options import positive_integer, positive_number


@dataclass(frozen=True)
class BLoB(Baseline):
    """Trains an adapter of its own on the case's training batches, and predicts with draws of it.

    Learning rates are constant here; the paper's fall linearly after a warm-up. What else is trained, such as a
    classifier in `modules_to_save`, is a point.

    Args:
        untrained: a model with an untrained adapter, from a seed; the baseline trains what it returns.
        epochs: through `Case.train`, which may come in another order each time.
        learning_rate: of AdamW, for everything that is trained, by the mean cross entropy of a batch.
        kl_learning_rate: of gradient descent, for M and G, by the weighted divergence.
        prior_sd: s.
        initial: G starts uniform in [initial / sqrt(2), initial].
        samples: draws behind a prediction; 0 for the mean weights.
    """

    untrained: Callable[[int], nn.Module] = field(repr=False)
    epochs: int = 8
    learning_rate: float = 1e-4
    kl_learning_rate: float = 0.01
    prior_sd: float = 0.2
    initial: float = 0.05
    samples: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "epochs", positive_integer("epochs", self.epochs))
        if self.samples:
            object.__setattr__(self, "samples", positive_integer("samples", self.samples))
        for name in ("learning_rate", "kl_learning_rate", "prior_sd", "initial"):
            object.__setattr__(self, name, positive_number(name, getattr(self, name)))

    def fit(self, case: Case) -> Predict:
        """Raises InvalidBatchError if a training batch has no labels, or there is no batch."""
        with seeded(case.seed):
            model = self.untrained(case.seed)
            layers = lora_layers(model, case.task.head(model))
            roots = [self._start(layer) for layer in layers]
            self._train(case, model, layers, roots)
        widths = [root.detach() ** 2 for root in roots]
        own = Case(model.eval(), case.task, case.train, case.held_out, case.seed)
        return lambda loader: self._predicted(own, layers, widths, loader)

    def _start(self, layer: LoraLayer) -> nn.Parameter:
        """G [r, d_in] of a layer."""
        start = torch.empty_like(layer.weights.A).uniform_(self.initial / math.sqrt(2), self.initial)
        return nn.Parameter(start)

    def _train(
        self, case: Case, model: nn.Module, layers: Sequence[LoraLayer], roots: Sequence[nn.Parameter]
    ) -> None:
        means = [next(layer.adapter_parts[0].parameters()) for layer in layers]
        trained = [p for p in model.parameters() if p.requires_grad]
        likelihood = torch.optim.AdamW([*trained, *roots], lr=self.learning_rate)
        complexity = torch.optim.SGD([*means, *roots], lr=self.kl_learning_rate)
        head, checks = case.task.head(model), DeferredChecks()
        for _ in range(self.epochs):
            batches = list(case.train)
            for i, batch in enumerate(batches):
                inputs = head.inputs(batch, device_of(model), checks)
                if inputs.labels is None:
                    raise InvalidBatchError("BLoB trains on labels: a batch of Case.train has none")
                with head.installed(), drawn(layers, roots):
                    u = head.u(model.train(), head.placed(model, inputs))
                _step(likelihood, nn.functional.cross_entropy(u, inputs.labels.to(u.device)))
                share = 2.0 ** (i - len(batches)) / (1 - 2.0 ** -len(batches))
                pairs = zip(means, roots, strict=True)
                _step(complexity, share * torch.stack([kl(m, g**2, self.prior_sd) for m, g in pairs]).sum())
        checks.settle()

    def _predicted(
        self, case: Case, layers: Sequence[LoraLayer], widths: Sequence[Tensor], loader: Loader
    ) -> Predictions:
        def draws() -> Iterator[tuple[Tensor, Tensor | None]]:
            if not self.samples:
                yield logits(case.model, case.task, loader)
            for _ in range(self.samples):
                with moved(layers, [width * torch.randn_like(width) for width in widths]):
                    yield logits(case.model, case.task, loader)

        with seeded(case.seed):
            return averaged(draws())


def kl(mean: Tensor, sd: Tensor, prior_sd: float) -> Tensor:
    """KL from N(0, prior_sd^2) of independent normals, in nats, summed."""
    return (0.5 * ((sd**2 + mean**2) / prior_sd**2 - 1) - (sd / prior_sd).log()).sum()


@contextmanager
def drawn(layers: Sequence[LoraLayer], roots: Sequence[Tensor]) -> Iterator[None]:
    """The layers with lora_A drawn anew for each sequence of the batch, with gradients in `roots` [r, d_in].

    One normal matrix E for the batch, random signs t [r] and s [d_in] for each sequence: A = M + (t s^T) * E * G^2.
    """

    def added(root: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            noise = root**2 * torch.randn_like(root)
            s, t = _signs(args[0]), _signs(output)
            return output + t * ((s * args[0]) @ noise.mT.to(args[0]))

        return add

    handles = [
        layer.adapter_parts[0].register_forward_hook(added(root))
        for layer, root in zip(layers, roots, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _signs(x: Tensor) -> Tensor:
    """[S, 1.., d] of x [S, .., d]: all tokens of a sequence share them."""
    shape = (x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])
    return torch.randint(2, shape, device=x.device).to(x.dtype) * 2 - 1


def _step(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
