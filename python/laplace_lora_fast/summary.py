"""What a fitted posterior looks like: dense factors for tests and other libraries, and a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from laplace_lora_fast.posterior import KronBlock, Posterior
from laplace_lora_fast.prior import PriorPrecision
from laplace_lora_fast.taps import Site


@dataclass(frozen=True)
class WeightFactors:
    """The Kronecker factors of one LoRA weight [out, in]: H = gradient_factor (x) input_factor, vec row-major."""

    block: KronBlock
    scaling: float

    @property
    def input_factor(self) -> Tensor:
        """Dense [in, in]."""
        return self._large() if self.block.side == "A" else self._small() / self.scaling**2

    @property
    def gradient_factor(self) -> Tensor:
        """Dense [out, out]."""
        return self._small() if self.block.side == "A" else self._large() * self.scaling**2

    def _large(self) -> Tensor:
        return self.block.large.dense()

    def _small(self) -> Tensor:
        vectors = self.block.small_vectors
        return ((vectors * self.block.small_values) @ vectors.mT).to(self.block.large.vectors.dtype)


@dataclass(frozen=True)
class LayerFactors:
    """The factors of one LoRA layer."""

    A: WeightFactors
    B: WeightFactors


def layer_factors(blocks: Sequence[KronBlock], sites: Sequence[Site]) -> dict[str, LayerFactors]:
    """Factors by layer name."""
    return {
        site.name: LayerFactors(WeightFactors(a, site.scaling), WeightFactors(b, site.scaling))
        for site, a, b in zip(sites, blocks[0::2], blocks[1::2], strict=True)
    }


def summarise(posterior: Posterior, prior_precision: PriorPrecision, left_alone: Sequence[str]) -> str:
    """A table with one row a weight and a line of totals."""
    width = max(len(block.layer) for block in posterior.blocks) + 2
    lines = [f"{'weight':{width}}  {'shape':>14}  {'rank':>6}  {'captured':>8}  {'effective parameters':>22}"]
    gammas = posterior.effective_parameters().tolist()
    for block, gamma in zip(posterior.blocks, gammas, strict=True):
        shape = tuple(block.mean.shape) if block.side == "A" else tuple(block.mean.mT.shape)
        share = f"{gamma:.1f} of {block.n_weights}"
        lines.append(
            f"{block.layer + '.' + block.side:{width}}  {shape!s:>14}  {block.large.rank:>6}  "
            f"{block.large.captured:>8.3f}  {share:>22}"
        )
    total = sum(block.n_weights for block in posterior.blocks)
    lines.append(
        f"{len(posterior.blocks)} weights, {sum(gammas):.1f} of {total} parameters determined by the data"
    )
    lines.append(
        f"prior precision {prior_precision if isinstance(prior_precision, float | int) else dict(prior_precision)}"
    )
    if left_alone:
        lines.append(
            f"{len(left_alone)} trained parameters outside LoRA keep their MAP value: {', '.join(left_alone[:4])}"
        )
    return "\n".join(lines)
