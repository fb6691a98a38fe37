"""Averages over models: of several trainings or checkpoints, or of one with its dropout left on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from laplace_lora_fast.baselines.base import Baseline, Case, Predict, averaged, logits, seeded
from laplace_lora_fast.evaluation.predictions import Predictions
from laplace_lora_fast.fitting.passes import Loader
from laplace_lora_fast.options import positive_integer


@dataclass(frozen=True)
class Ensemble(Baseline):
    """The mean of several models' probabilities, that of the case among them.

    Of independent trainings it is a deep ensemble (Lakshminarayanan, Pritzel and Blundell 2017), of the last
    checkpoints of one training a checkpoint ensemble (Chen, Lundberg and Lee 2017).

    Args:
        others: the models beside that of the case.
    """

    others: Sequence[nn.Module] = field(repr=False)

    def __post_init__(self) -> None:
        if not self.others:
            raise ValueError("others must hold at least one model beside that of the case")

    def fit(self, case: Case) -> Predict:
        return lambda loader: averaged(
            logits(model, case.task, loader) for model in (case.model, *self.others)
        )


@dataclass(frozen=True)
class MCDropout(Baseline):
    """The mean of probabilities with dropout left on (Gal and Ghahramani 2016), at the rates of the training.

    All dropout layers draw; what a fused attention kernel drops inside stays off.

    Args:
        samples: T passes.
    """

    samples: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", positive_integer("samples", self.samples))

    def fit(self, case: Case) -> Predict:
        """Raises ValueError for a model that was trained without dropout."""
        if not _rates(case.model):
            raise ValueError("MCDropout needs a model that was trained with dropout: all its rates are 0")

        def passes(loader: Loader) -> Iterator[tuple[Tensor, Tensor | None]]:
            for _ in range(self.samples):
                yield logits(case.model, case.task, loader)

        def predict(loader: Loader) -> Predictions:
            with seeded(case.seed), dropout_on(case.model):
                return averaged(passes(loader))

        return predict


def _rates(model: nn.Module) -> list[float]:
    return [module.p for module in model.modules() if isinstance(module, nn.Dropout) and module.p > 0]


@contextmanager
def dropout_on(model: nn.Module) -> Iterator[None]:
    """Dropout layers draw inside, in evaluation mode too: hooks draw the masks, no flag of the model's is touched."""

    def drop(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return nn.functional.dropout(args[0], module.p, training=True)  # type: ignore[arg-type]

    handles = [
        module.register_forward_hook(drop)  # type: ignore[arg-type]
        for module in model.modules()
        if isinstance(module, nn.Dropout) and module.p > 0
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
