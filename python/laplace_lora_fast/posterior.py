"""The Gaussian posterior over LoRA weights: Kronecker blocks in their eigenbasis.

The precision of one weight is H + lambda I with H = small (x) large, eigenvalues t_j s_i on v_j (x) u_i, and t_j tau on
what the large factor's eigenvectors leave out (its tail). Everything a Laplace posterior is asked for is a function of
these eigenvalues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.factors import Spectrum


@dataclass(frozen=True)
class KronBlock:
    """Curvature and MAP value of one LoRA weight, oriented as [r, d]: lora_A as it is, lora_B transposed.

    Attributes:
        layer: the LoRA layer's name.
        side: "A" or "B".
        large: spectrum over the long side d: lora_A's input factor, or lora_B's gradient factor.
        small_values: [r] fp64, descending: of the other factor (with all scalings in it).
        small_vectors: V [r, r] fp64.
        mean: [r, d] the MAP weight.
    """

    layer: str
    side: str
    large: Spectrum
    small_values: Tensor
    small_vectors: Tensor
    mean: Tensor

    @classmethod
    def build(cls, layer: str, side: str, large: Spectrum, small: Tensor, mean: Tensor) -> KronBlock:
        """Eigendecomposes the small factor [r, r] (fp64)."""
        values, vectors = torch.linalg.eigh(small)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1).contiguous()
        return cls(layer, side, large, values, vectors, mean.clone(memory_format=torch.contiguous_format))

    def scaled(self, curvature: float | Tensor) -> KronBlock:
        """The block of `curvature` times H."""
        return replace(self, small_values=self.small_values * curvature)

    @property
    def name(self) -> tuple[str, str]:
        return self.layer, self.side

    @property
    def n_weights(self) -> int:
        return self.mean.numel()

    def eigenvalues(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of H and their multiplicities, fp64 [r (k + 1)] each: the kept ones, then the tail's."""
        kept = self.small_values[:, None] * self.large.values
        tail = self.small_values * self.large.tail
        left_out = torch.full_like(tail, self.large.dim - self.large.rank)
        return torch.cat([kept.flatten(), tail]), torch.cat([torch.ones_like(kept).flatten(), left_out])

    def log_det_ratio(self, prior_precision: float) -> Tensor:
        """logdet(H + lambda I) - P log lambda, fp64 scalar."""
        values, counts = self.eigenvalues()
        return (counts * (values / prior_precision).log1p()).sum()

    def variances(self, projected: Tensor, row_grams: Tensor | None, prior_precisions: Tensor) -> Tensor:
        """Quadratic forms J (H + lambda I)^-1 J^T of per-example Jacobians in this block's basis.

        Args:
            projected: P [N, C, r, k], rotated by V on the small side and projected on U on the large one.
            row_grams: D [N, r, C, C], or None if the large spectrum is complete (k = d).
            prior_precisions: lambda [G].

        Returns:
            [G, N, C, C].
        """
        n, classes, r, k = projected.shape
        flat = projected.reshape(n, classes, r * k)
        kept = self.small_values[:, None] * self.large.values
        weights = 1 / (kept.flatten()[:, None] + prior_precisions)  # [r k, G] in fp64
        weights = weights.to(projected)
        columns = [(flat[:, c : c + 1] * flat) @ weights for c in range(classes)]  # [N, C, G] each
        cov = torch.stack(columns, 1).permute(3, 0, 1, 2)
        if row_grams is not None:
            per_row = projected.transpose(1, 2)
            residual = row_grams - per_row @ per_row.mT
            tail = 1 / (self.small_values[:, None] * self.large.tail + prior_precisions)  # [r, G]
            cov = cov + torch.einsum("nrcd,rg->gncd", residual, tail.to(residual))
        return cov

    def apply_power(self, weights: Tensor, power: float, prior_precision: float) -> Tensor:
        """(H + lambda I)^power applied to weights [B, r, d]."""
        core = (self.small_values[:, None] * self.large.values + prior_precision) ** power
        tail = (self.small_values * self.large.tail + prior_precision) ** power
        cast = self.large.vectors.dtype
        return lk.kron_apply(
            weights.to(cast), self.large.vectors, self.small_vectors.to(cast), core.to(cast), tail.to(cast)
        )

    def covariance(self, prior_precision: float) -> Tensor:
        """Dense covariance [P, P] of vec(weight), row-major in the weight's own orientation. For small layers.

        A is [r, d] with covariance (small (x) large + lambda I)^-1, B is [d, r] with (large (x) small + lambda I)^-1.
        """
        small = (self.small_vectors * self.small_values) @ self.small_vectors.mT
        large = self.large.dense().double()
        pair = (small, large) if self.side == "A" else (large, small)
        precision = torch.kron(*(factor.contiguous() for factor in pair))
        precision.diagonal().add_(prior_precision)
        return torch.linalg.inv(precision)


class Posterior:
    """Independent blocks, each with its prior precision lambda.

    Args:
        blocks: A and B of every LoRA layer.
        prior_precision: fp64 [n_blocks].
    """

    def __init__(self, blocks: Sequence[KronBlock], prior_precision: Tensor) -> None:
        self.blocks = list(blocks)
        self.prior_precision = prior_precision

    def log_det_ratio(self) -> Tensor:
        """Sum over blocks of logdet(H + lambda I) - P log lambda, fp64 scalar."""
        return torch.stack([b.log_det_ratio(lam) for b, lam in self._pairs()]).sum()

    def effective_parameters(self) -> Tensor:
        """Gamma [n_blocks] fp64: sum over eigenvalues of h / (h + lambda), MacKay's count of determined weights."""
        gammas = []
        for block, lam in self._pairs():
            values, counts = block.eigenvalues()
            gammas.append((counts * values / (values + lam)).sum())
        return torch.stack(gammas)

    def covariance(self, layer: str, side: str) -> Tensor:
        """Dense covariance [P, P] fp64 of vec(weight), row-major, of lora_`side` in `layer`. For small layers.

        Raises:
            KeyError: there is no such block.
        """
        for block, lam in self._pairs():
            if block.name == (layer, side):
                return block.covariance(lam)
        raise KeyError(
            f"no block {side!r} in layer {layer!r}; layers: {sorted({b.layer for b in self.blocks})}"
        )

    def sample(self, n: int, generator: torch.Generator) -> list[Tensor]:
        """Draws n weights of every block, each [n, r, d] in the block's orientation (lora_B transposed)."""
        samples = []
        for block, lam in self._pairs():
            mean = block.mean.to(block.large.vectors.dtype)
            noise = torch.randn((n, *mean.shape), generator=generator, dtype=torch.float64)
            samples.append(mean + block.apply_power(noise.to(mean), -0.5, lam))
        return samples

    def _pairs(self) -> list[tuple[KronBlock, float]]:
        return list(zip(self.blocks, self.prior_precision.tolist(), strict=True))
