"""The Gaussian posterior over LoRA weights: a curvature and a prior precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_lora_fast.curvature import Curvature


@dataclass(frozen=True)
class Posterior:
    """N(theta*, (H + Lambda)^-1).

    Attributes:
        curvature: H and theta*.
        prior_precision: Lambda's diagonal, one value per block, fp64 [n_blocks].
    """

    curvature: Curvature
    prior_precision: Tensor

    def log_det_ratio(self) -> Tensor:
        """logdet(H + Lambda) - logdet Lambda, fp64 scalar."""
        return self.curvature.log_det_ratio(self.prior_precision)

    def effective_parameters(self) -> Tensor:
        """Gamma [n_blocks] fp64: how many weights of each block the data determine (MacKay 1992)."""
        return self.curvature.effective_parameters(self.prior_precision)

    def covariance(self, layer: str, side: str) -> Tensor:
        """Dense marginal covariance [P, P] fp64 of vec(weight), row-major, of lora_`side` in `layer`.

        For small layers.

        Raises:
            KeyError: there is no such block.
        """
        names = self.curvature.names
        if (layer, side) not in names:
            raise KeyError(
                f"no block {side!r} in layer {layer!r}; layers: {sorted({name for name, _ in names})}"
            )
        return self.curvature.covariance(names.index((layer, side)), self.prior_precision)

    def sample(self, n: int, generator: torch.Generator) -> list[Tensor]:
        """Draws n weights of every block, each [n, r, d] in the block's orientation (lora_B transposed)."""
        with torch.autocast(self.curvature.means[0].device.type, enabled=False):
            return self.curvature.sample(n, generator, self.prior_precision)
