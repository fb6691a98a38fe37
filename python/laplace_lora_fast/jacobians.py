"""Per-example Jacobians of LoRA weights from the taps, and the predictive of independent blocks.

For lora_A the Jacobian of one output is sum_t g_A (x) x, for lora_B it is sum_t z (x) s g: an [r, d] matrix an example,
formed from the streams, used, and dropped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

import laplace_kernels as lk
from laplace_lora_fast.heads import Inputs, check_outputs
from laplace_lora_fast.taps import Site, Tap

if TYPE_CHECKING:
    from laplace_lora_fast.blocks import Block


def jacobian(small: Tensor, large: Tensor) -> Tensor:
    """Sum over tokens of small (x) large: [N, Ks, T, r], [N, Kl, T, d] -> [N, K, r, d]."""
    return small.mT @ large.to(small.dtype)


class JacobianObserver(ABC):
    """Observer that hands on every block's Jacobian as its two token streams, one backward pass at a time.

    Args:
        sites: the tapped layers.
        rotations: for each block a rotation V [r, r] of the small side, or None.
    """

    def __init__(self, sites: Sequence[Site], rotations: Sequence[Tensor | None]) -> None:
        self._maps = []  # onto the small sides, each [r, d]: BLAS reads long rows twice as fast
        for site, to_a, to_b in zip(sites, rotations[0::2], rotations[1::2], strict=True):
            b, a = site.scaling * site.B.double().mT, site.scaling * site.A.double()
            self._maps.append((b if to_a is None else to_a.mT @ b, a if to_b is None else to_b.mT @ a))
        self._inputs: dict[int, Tensor] = {}
        self._small_b: dict[int, Tensor] = {}
        self.groups: Sequence[int] = []

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> None:
        self._inputs[group] = _real_tokens(x, mask)

    def observe_gradient(self, site: int, g: Tensor, mask: Tensor | None) -> None:
        dtype = lk.accumulation_dtype(g.dtype)
        x, g = self._inputs[self.groups[site]], _real_tokens(g, mask)
        to_a, to_b = self._maps[site]
        if to_a.dtype != dtype:  # once
            to_a, to_b = self._maps[site] = to_a.to(dtype), to_b.to(dtype)
        if site not in self._small_b:  # the same in every backward pass
            self._small_b[site] = linear(x.to(dtype), to_b)[:, None]  # s V^T A x
        small_a = linear(g.to(dtype), to_a)[:, None]  # s V^T B^T g
        self.observe_jacobian(2 * site, small_a, x[:, None])
        self.observe_jacobian(2 * site + 1, self._small_b[site], g[:, None])

    @abstractmethod
    def observe_jacobian(self, block: int, small: Tensor, large: Tensor) -> None:
        """The Jacobian of one output of every example is the sum over tokens of small (x) large.

        Args:
            block: index of the LoRA weight.
            small: [N, 1, T, r], rotated.
            large: [N, 1, T, d], zero at pads.
        """

    def sweep(self, tap: Tap, inputs: Inputs, cotangents: Tensor) -> Tensor:
        """One forward pass over a batch and one backward pass for each column of `cotangents` [C, K].

        Returns:
            Logits [N, C], detached, in the accumulation dtype.

        Raises:
            InvalidBatchError: the batch gives another number of logits.
        """
        outputs, passes = cotangents.shape
        try:
            logits = tap.forward(inputs)
            check_outputs(logits, outputs)
            tap.check_rows(logits)
            assert tap.groups is not None
            self.groups = tap.groups
            for k, direction in enumerate(cotangents.to(logits).mT):
                tap.backward(logits, direction.expand_as(logits), last=k == passes - 1)
        finally:
            self.forget()
        return logits.detach().to(lk.accumulation_dtype(logits.dtype))

    def forget(self) -> None:
        """Drops what is held of the current batch."""
        self._inputs.clear()
        self._small_b.clear()


class BlockPredictor(JacobianObserver):
    """Covariances of independent blocks, summed as their Jacobians come.

    What waits for the last of K passes is, per site, the [N, K, T, r] gradient at lora_A's output and lora_B's
    [N, K, r, d_out] Jacobian; nothing with K = 1.

    Args:
        sites: the tapped layers.
        blocks: two per site, A and B.
        prior_precisions: fp64 [n_blocks, G], one column per prior to evaluate.
        n_cotangents: K.
    """

    def __init__(
        self, sites: Sequence[Site], blocks: Sequence[Block], prior_precisions: Tensor, n_cotangents: int
    ) -> None:
        super().__init__(sites, [block.rotation() for block in blocks])
        self._blocks, self._n_cotangents = blocks, n_cotangents
        rows = [
            row.unique(return_inverse=True) for row in prior_precisions
        ]  # a grid over groups repeats its values
        self._precisions = [
            (values.to(block.mean.device), inverse.to(block.mean.device))
            for (values, inverse), block in zip(rows, blocks, strict=True)
        ]
        self._waiting: dict[int, list[Tensor]] = {}
        self._covariance: Tensor | None = None

    def run(self, tap: Tap, inputs: Inputs, cotangents: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See `Predictor`: sees the Gaussian itself."""
        self._covariance = None
        logits = self.sweep(tap, inputs, cotangents)
        assert self._covariance is not None
        return logits, (logits @ cotangents.to(logits), self._covariance)

    def gaussians(self, batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        means, covs = zip(*batches, strict=True)
        return torch.cat(means), torch.cat(covs, 1)

    def observe_jacobian(self, block: int, small: Tensor, large: Tensor) -> None:
        if self._n_cotangents == 1:
            self._add(block, small, large)
            return
        is_a = block % 2 == 0
        waiting = self._waiting.setdefault(block, [])
        waiting.append(small if is_a else jacobian(small, large))
        if len(waiting) < self._n_cotangents:
            return
        stacked = torch.cat(self._waiting.pop(block), 1)
        if is_a:
            self._add(block, stacked, large)
        else:  # Jacobians [N, K, r, d], as if each row were a token
            unit = torch.eye(stacked.shape[2], dtype=stacked.dtype, device=stacked.device)
            self._add(block, unit.expand(len(stacked), 1, -1, -1), stacked)

    def forget(self) -> None:
        super().forget()
        self._waiting.clear()

    def _add(self, block: int, small: Tensor, large: Tensor) -> None:
        values, inverse = self._precisions[block]
        cov = self._blocks[block].variances(small, large, values)
        if len(inverse) > len(values) or len(values) > 1:
            cov = cov[inverse]
        if self._covariance is None:
            self._covariance = torch.zeros_like(cov)
        self._covariance += cov.to(self._covariance.device)


def _real_tokens(stream: Tensor, mask: Tensor | None) -> Tensor:
    """A stream [N, T, d] with zeros at pads."""
    return stream if mask is None else stream.where(mask[..., None], 0)
