"""Curvature as independent blocks, one a LoRA weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.structures.base import Curvature
from laplace_lora_fast.structures.blocks.algebra import Block, DiagBlock, KronBlock
from laplace_lora_fast.structures.blocks.spectrum import Spectrum
from laplace_lora_fast.structures.search import evidence_root
from laplace_lora_fast.weights import WeightName, stored_covariance

_MOST_ROUNDING = 1e-3  # of a variance


class BlockCurvature(Curvature):
    """Independent blocks.

    Args:
        names: of the weights.
        blocks: one a weight.
        extremes: where known, `KronBlock.extremes` of every block.
    """

    def __init__(
        self,
        names: Sequence[WeightName],
        blocks: Sequence[Block],
        extremes: Sequence[Sequence[float]] | None = None,
    ) -> None:
        self.names, self.blocks = list(names), list(blocks)
        self.means = [block.mean for block in blocks]
        self._extremes = extremes

    @property
    def extremes(self) -> Sequence[Sequence[float]]:
        """`KronBlock.extremes` of every block; read off the device once."""
        if self._extremes is None:
            pairs = [block.extremes() for block in self.blocks if isinstance(block, KronBlock)]
            self._extremes = (
                torch.stack([pair.to(pairs[0].device) for pair in pairs]).tolist() if pairs else []
            )
        return self._extremes

    def scaled(self, factor: float | Tensor) -> BlockCurvature:
        blocks = [block.scaled(factor) for block in self.blocks]
        known = self._extremes is not None and not isinstance(factor, Tensor)
        extremes = [[factor * value for value in pair] for pair in self.extremes] if known else None
        return BlockCurvature(self.names, blocks, extremes)  # type: ignore[arg-type]

    def whitened_spectrum(self, prior_precision: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [block.eigenvalues() for block in self.blocks]
        values = [v.cpu() / lam for (v, _), lam in zip(pairs, prior_precision.tolist(), strict=True)]
        return torch.cat(values), torch.cat([counts.cpu() for _, counts in pairs])

    def effective_parameters(self, prior_precision: Tensor) -> Tensor:
        gammas = []
        for block, lam in zip(self.blocks, prior_precision.tolist(), strict=True):
            values, counts = block.eigenvalues()
            gammas.append((counts * values / (values + lam)).sum().cpu())
        return torch.stack(gammas)

    def maximise_evidence(self, keys: Sequence[str], squared_norms: Sequence[float]) -> dict[str, float]:
        """Groups are independent, and each has one maximum in log lambda: no search, no model pass."""
        best = {}
        for key in dict.fromkeys(keys):
            members = [index for index, other in enumerate(keys) if other == key]
            pairs = [self.blocks[index].eigenvalues() for index in members]
            values, counts = (torch.cat([part.cpu() for part in parts]) for parts in zip(*pairs, strict=True))
            best[key] = evidence_root(values, counts, sum(squared_norms[index] for index in members), key)
        return best

    def sound_under(self, prior_precisions: Tensor) -> list[Block]:
        """The blocks, in the form that keeps its digits under these priors [n_weights, G]."""
        blocks = list(self.blocks)
        least = prior_precisions.amin(1).tolist()
        for index, (largest, tail) in enumerate(self.extremes):
            block, lam = blocks[index], least[index]
            eps = torch.finfo(lk.accumulation_dtype(block.mean.dtype)).eps
            if eps * (largest + lam) > _MOST_ROUNDING * (tail + lam):
                assert isinstance(block, KronBlock)
                blocks[index] = block.careful()
        return blocks

    def sample(self, n: int, generator: torch.Generator, prior_precision: Tensor) -> list[Tensor]:
        samples = []
        for block, lam in zip(self.blocks, prior_precision.tolist(), strict=True):
            noise = torch.randn((n, *block.mean.shape), generator=generator, dtype=torch.float64)
            step = block.apply_power(noise.to(block.mean.device), -0.5, lam)
            samples.append(block.mean.to(step.dtype) + step)
        return samples

    def covariance(self, weight: int, prior_precision: Tensor) -> Tensor:
        block = self.blocks[weight]
        covariance = block.covariance(float(prior_precision[weight]))
        return stored_covariance(self.names[weight].side, covariance, tuple(block.mean.shape))

    def damaged(self) -> list[int]:
        return [index for index, block in enumerate(self.blocks) if not block.is_sound()]

    def describe(self) -> list[dict[str, str]]:
        return [block.describe() for block in self.blocks]

    def dense_factors(self) -> list[tuple[Tensor, Tensor]]:
        blocks = [block for block in self.blocks if isinstance(block, KronBlock)]
        return [block.factors() for block in blocks] if blocks else super().dense_factors()

    def tensors(self) -> dict[str, Tensor]:
        """Spectra that several blocks share are stored once."""
        tensors: dict[str, Tensor] = {}
        order: dict[int, int] = {}
        for index, block in enumerate(self.blocks):
            for field in fields(block):  # type: ignore[arg-type]
                value = getattr(block, field.name)
                if isinstance(value, Tensor):
                    tensors[f"block.{index}.{field.name}"] = value
                    continue
                place = order.setdefault(id(value), len(order))
                tensors[f"block.{index}.spectrum"] = torch.tensor(place)
                tensors |= {
                    f"spectrum.{place}.{part.name}": getattr(value, part.name) for part in fields(value)
                }
        return tensors

    @classmethod
    def from_tensors(
        cls,
        names: list[WeightName],
        tensors: dict[str, Tensor],
        devices: Sequence[torch.device],
    ) -> BlockCurvature:
        """Of what `tensors` gave, every weight on its device. Raises KeyError for a missing tensor."""
        spectra: dict[int, Spectrum] = {}
        blocks: list[Block] = []
        extremes = []
        for index, device in enumerate(devices):
            place = tensors.get(f"block.{index}.spectrum")
            if place is None:
                parts = (tensors[f"block.{index}.{field.name}"].to(device) for field in fields(DiagBlock))
                blocks.append(DiagBlock(*parts))
                continue
            key = int(place)
            if key not in spectra:
                spectra[key] = Spectrum(
                    *(tensors[f"spectrum.{key}.{f.name}"].to(device) for f in fields(Spectrum))
                )
            own = {
                f.name: tensors[f"block.{index}.{f.name}"].to(device)
                for f in fields(KronBlock)
                if f.name != "large"
            }
            block = KronBlock(large=spectra[key], **own)
            blocks.append(block)
            core, tail = (tensors[f"block.{index}.{part}"] for part in ("core", "tail"))  # not on a GPU yet
            extremes.append(replace(block, core=core, tail=tail).extremes().tolist())
        return cls(names, blocks, extremes)
