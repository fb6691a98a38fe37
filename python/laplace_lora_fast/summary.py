"""What a fitted posterior looks like: dense factors for tests and other libraries, and a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from laplace_lora_fast.blocks import KronBlock
from laplace_lora_fast.curvature import Curvature
from laplace_lora_fast.posterior import Posterior
from laplace_lora_fast.prior import PriorPrecision
from laplace_lora_fast.taps import Site


@dataclass(frozen=True)
class WeightFactors:
    """The Kronecker factors of one LoRA weight [out, in]: H = gradient_factor (x) input_factor, vec row-major."""

    block: KronBlock
    side: str
    scaling: float

    @property
    def input_factor(self) -> Tensor:
        """Dense [in, in]."""
        return self._large() if self.side == "A" else self._small() / self.scaling**2

    @property
    def gradient_factor(self) -> Tensor:
        """Dense [out, out]."""
        return self._small() if self.side == "A" else self._large() * self.scaling**2

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


def layer_factors(curvature: Curvature, sites: Sequence[Site]) -> dict[str, LayerFactors]:
    """Factors by layer name. Raises ValueError for a structure without Kronecker factors."""
    blocks = [block for block in getattr(curvature, "blocks", []) if isinstance(block, KronBlock)]
    if not blocks:
        raise ValueError(f"structure {curvature.structure!r} has no Kronecker factors")
    return {
        site.name: LayerFactors(WeightFactors(a, "A", site.scaling), WeightFactors(b, "B", site.scaling))
        for site, a, b in zip(sites, blocks[0::2], blocks[1::2], strict=True)
    }


def summarise(
    posterior: Posterior, prior_precision: PriorPrecision, left_alone: Sequence[str], reason: str
) -> str:
    """A table with one row a weight, and lines of totals."""
    curvature = posterior.curvature
    width = max(len(layer) for layer, _ in curvature.names) + 2
    lines = [
        f"structure {curvature.structure}" + (f" (auto: {reason})" if reason else ""),
        f"{'weight':{width}}  {'shape':>14}  {'rank':>6}  {'captured':>8}  {'effective parameters':>22}",
    ]
    gammas = posterior.effective_parameters().tolist()
    rows = zip(curvature.names, curvature.means, curvature.describe(), gammas, strict=True)
    for (layer, side), mean, (rank, captured), gamma in rows:
        shape = tuple(mean.shape) if side == "A" else tuple(mean.mT.shape)
        share = f"{gamma:.1f} of {mean.numel()}"
        lines.append(f"{layer + '.' + side:{width}}  {shape!s:>14}  {rank:>6}  {captured:>8.3f}  {share:>22}")
    total = sum(mean.numel() for mean in curvature.means)
    lines.append(f"{len(gammas)} weights, {sum(gammas):.1f} of {total} parameters determined by the data")
    lines.append(f"prior precision {prior_precision}")
    if left_alone:
        names = ", ".join(left_alone[:4]) + (", ..." if len(left_alone) > 4 else "")
        lines.append(f"{len(left_alone)} trained parameters outside keep their MAP value: {names}")
    return "\n".join(lines)
