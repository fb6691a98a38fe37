"""Whether posterior samples can stand as weights: how far they go, and how far the model is from linear there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from laplace_lora_fast.model.batches import Batch, without_labels
from laplace_lora_fast.sampling.samples import PosteriorSamples

LONGEST = 1.0  # times the adapter's own length


@dataclass(frozen=True)
class Lengths:
    """How far samples are from the trained adapter, over all weights together.

    Attributes:
        steps: |delta| of every sample, fp64 [n].
        adapter: |theta|.
        needed: the factor on the prior precision that surely makes samples no longer than the adapter.
    """

    steps: Tensor
    adapter: float
    needed: float

    @classmethod
    def of(cls, steps: Tensor, means: Sequence[Tensor], prior_precision: Tensor) -> Lengths:
        """Of samples around `means` under a prior precision, fp64 [n_weights].

        The expected |delta|^2 is tr (H + Lambda)^-1, at most the sum over weights of their entries / lambda.
        """
        squares = sum(float(mean.double().square().sum()) for mean in means)
        most = sum(mean.numel() / value for mean, value in zip(means, prior_precision.tolist(), strict=True))
        return cls(steps, squares**0.5, most / max(squares, torch.finfo(torch.float64).tiny))

    @property
    def ratio(self) -> float:
        """The longest |delta| / |theta|."""
        return float(self.steps.max()) / max(self.adapter, torch.finfo(torch.float64).tiny)

    def require_near(self, advice: str) -> None:
        """Raises ValueError for samples that are longer than the adapter itself; says what to do."""
        if self.ratio <= LONGEST:
            return
        raise ValueError(
            f"the samples move the adapter by {float(self.steps.max()):.4g}, {self.ratio:.3g} times its own length "
            f"{self.adapter:.4g}: that far from the trained weights the model is not the linear one that the posterior "
            "is about, and language models write garbage. predict needs no samples. To write them nevertheless pass "
            f"{advice}, or force=True"
        )


class AdapterSamples(list[Path]):
    """The folders of samples, and what is known about them.

    Attributes:
        lengths: against the adapter's own.
        gaps: of every sample, how far its model's functions are from those of the linearised model, over how far those
            are from the trained model's; fp64 [n]. None where no batches were given.
    """

    def __init__(self, folders: Iterable[Path], lengths: Lengths, gaps: Tensor | None) -> None:
        super().__init__(folders)
        self.lengths, self.gaps = lengths, gaps

    @property
    def report(self) -> str:
        """A line for each sample."""
        lines = [
            f"adapter of length {self.lengths.adapter:.4g}; a gap of 0 is a linear model, 1 and more another one"
        ]
        for place, (folder, step) in enumerate(zip(self, self.lengths.steps.tolist(), strict=True)):
            gap = "" if self.gaps is None else f", gap {float(self.gaps[place]):.3f}"
            lines.append(f"{folder.name}: {step:.4g} from the adapter{gap}")
        return "\n".join(lines)


def gaps(samples: PosteriorSamples, batches: Iterable[Batch]) -> Tensor:
    """Sum over outputs of |f(theta + delta) - f(theta) - J delta| over that of |J delta|, fp64 [n].

    Outputs are taken from their mean over an example's, which is all that a softmax sees of logits.
    """
    still = PosteriorSamples.still(samples)
    off, moved = torch.zeros(len(samples)).double(), torch.zeros(len(samples)).double()
    for batch in map(without_labels, batches):
        plain = still.outputs(batch, linearised=False).double().cpu()
        linear, real = (samples.outputs(batch, linearised=how).double().cpu() for how in (True, False))
        for total, difference in ((off, real - linear), (moved, linear - plain)):
            if difference.shape[2] > 1:
                difference = difference - difference.mean(2, keepdim=True)
            total += difference.abs().sum((1, 2))
    return off / moved.clamp_min(torch.finfo(torch.float64).tiny)
