"""The linearised predictive: per-example Jacobian statistics of every block, summed to logit covariances.

f ~ N(f*, sum over blocks of J (H + lambda I)^-1 J^T). For lora_A the Jacobian of one output is sum_t g_A (x) x, for
lora_B it is sum_t z (x) s g: an [r, d] matrix an example, formed from the taps, projected, and dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kernels as lk
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError
from laplace_lora_fast.heads import Head, Inputs, device_of
from laplace_lora_fast.likelihoods import Likelihood
from laplace_lora_fast.posterior import KronBlock
from laplace_lora_fast.progress import track
from laplace_lora_fast.taps import Observer, Site, Tap


@dataclass(frozen=True)
class LinearisedModel:
    """A model, where its LoRA layers are tapped, and the curvature there."""

    model: nn.Module
    head: Head
    sites: Sequence[Site]
    groups: Sequence[int]
    blocks: Sequence[KronBlock]
    likelihood: Likelihood
    n_outputs: int

    def tap(self, observer: Observer | None) -> Tap:
        """A tap on the model with the fit's grouping of inputs."""
        return Tap(self.model, self.head, list(self.sites), observer, list(self.groups))

    def batches(self, loader: Iterable[Mapping[str, Any]], checks: DeferredChecks) -> Iterator[Inputs]:
        """Checked batches on the model's device. Raises InvalidBatchError for an empty loader."""
        inputs = None
        for batch in loader:
            inputs = self.head.inputs(batch, device_of(self.model), checks)
            yield inputs
        if inputs is None:
            raise InvalidBatchError("the loader yielded no batch")

    def forward(self, tap: Tap, inputs: Inputs) -> Tensor:
        """Logits [N, C] with their graph. Raises InvalidBatchError if C is not the fit's."""
        logits = tap.forward(inputs)
        if logits.shape[1] != self.n_outputs:
            raise InvalidBatchError(
                f"a batch gives {logits.shape[1]} logits per example, those of the fit gave {self.n_outputs}"
            )
        return logits


def distribution(
    linearised: LinearisedModel,
    prior_precisions: Tensor,
    parts: Sequence[int],
    loader: Iterable[Mapping[str, Any]],
    cotangents: Tensor,
    what: str,
    progress: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gaussian of `logits @ cotangents` over a loader, for several priors in one pass.

    Args:
        linearised: the model and its curvature.
        prior_precisions: fp64 [n_blocks, G].
        parts: for each block the part of the covariance it adds to.
        loader: batches.
        cotangents: [C, K].
        what: name of the progress bar.
        progress: show it.

    Returns:
        Mean [N, K], covariance [parts, G, N, K, K], targets (None if some batch has no labels).

    Raises:
        InvalidBatchError: the loader is empty or a batch is unusable.
    """
    checks = DeferredChecks()
    observer = CovarianceAccumulator(
        linearised.sites, linearised.blocks, prior_precisions, parts, cotangents.shape[1]
    )
    means, covs, targets = [], [], []
    with linearised.tap(observer) as tap:
        for inputs in linearised.batches(track(loader, what, progress), checks):
            logits, cov = observer.run(linearised, tap, inputs, cotangents)
            targets.append(_checked_targets(linearised.likelihood, logits, inputs, checks))
            means.append(logits @ cotangents.to(logits))
            covs.append(cov)
    checks.settle()
    return torch.cat(means), torch.cat(covs, 2), _joined(targets)


def map_logits(
    linearised: LinearisedModel, loader: Iterable[Mapping[str, Any]], progress: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits [N, C] of the plain model over a loader, and targets as in `distribution`."""
    checks = DeferredChecks()
    all_logits, targets = [], []
    with linearised.tap(None) as tap:
        for inputs in linearised.batches(track(loader, "predict", progress), checks):
            logits = linearised.forward(tap, inputs).detach()
            logits = logits.to(lk.accumulation_dtype(logits.dtype))
            targets.append(_checked_targets(linearised.likelihood, logits, inputs, checks))
            all_logits.append(logits)
    checks.settle()
    return torch.cat(all_logits), _joined(targets)


def _checked_targets(
    likelihood: Likelihood, logits: Tensor, inputs: Inputs, checks: DeferredChecks
) -> Tensor | None:
    checks.require(logits.isfinite().all(), "a batch gives logits that are not finite")
    return likelihood.targets(inputs.labels, logits, checks)


def _joined(targets: Sequence[Tensor | None]) -> Tensor | None:
    given = [target for target in targets if target is not None]
    return torch.cat(given) if len(given) == len(targets) else None


class CovarianceAccumulator:
    """Observer that turns the streams of one batch into covariances of its cotangents' outputs.

    The caller announces each backward pass with `cotangent`. What waits for the last of K passes is, per site, the
    [N, K, T, r] gradient at lora_A's output and lora_B's [N, K, r, d_out] Jacobian; nothing with K = 1.

    Args:
        sites: the tapped layers.
        blocks: two per site, A and B.
        prior_precisions: fp64 [n_blocks, G], one column per prior to evaluate.
        parts: for each block which part of the covariance it belongs to.
        n_cotangents: K.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        blocks: Sequence[KronBlock],
        prior_precisions: Tensor,
        parts: Sequence[int],
        n_cotangents: int,
    ) -> None:
        self._blocks, self._parts = blocks, parts
        self._prior_precisions, self._n_cotangents = prior_precisions, n_cotangents
        self._rotations = [
            (s.scaling * s.B.double() @ a.small_vectors, s.scaling * s.A.double().mT @ b.small_vectors)
            for s, a, b in zip(sites, blocks[0::2], blocks[1::2], strict=True)
        ]
        self._groups: list[int] = []
        self._cotangent = 0
        self._covariance: Tensor | None = None
        self._inputs: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._small_a: dict[int, list[Tensor]] = {}
        self._jacobian_b: dict[int, list[Tensor]] = {}

    def run(
        self, linearised: LinearisedModel, tap: Tap, inputs: Inputs, cotangents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One forward and K backward passes over a batch.

        Args:
            linearised: the model.
            tap: entered, with this accumulator as its observer.
            inputs: the batch.
            cotangents: [C, K], the directions of the outputs to look at.

        Returns:
            Logits [N, C] and covariances [parts, G, N, K, K] of `logits @ cotangents`.
        """
        self._covariance = None
        try:
            logits = linearised.forward(tap, inputs)
            assert tap.groups is not None
            self._groups = tap.groups
            directions = cotangents.to(logits)
            for k in range(self._n_cotangents):
                self._cotangent = k
                tap.backward(logits, directions[:, k].expand_as(logits), last=k == self._n_cotangents - 1)
        finally:
            self._inputs.clear()
            self._small_a.clear()
            self._jacobian_b.clear()
        assert self._covariance is not None
        return logits.detach().to(self._covariance.dtype), self._covariance

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> None:
        self._inputs[group] = x, mask

    def observe_gradient(self, site: int, g: Tensor, mask: Tensor | None) -> None:
        dtype = lk.accumulation_dtype(g.dtype)
        x, _ = self._inputs[self._groups[site]]
        to_a, to_b = (rotation.to(dtype) for rotation in self._rotations[site])
        small_a, small_b = g.to(dtype) @ to_a, x.to(dtype) @ to_b  # s V^T B^T g and s V^T A x
        if self._n_cotangents == 1:
            self._add(2 * site, small_a[:, None], x[:, None], mask)
            self._add(2 * site + 1, small_b[:, None], g[:, None], mask)
            return
        self._small_a.setdefault(site, []).append(small_a)
        self._jacobian_b.setdefault(site, []).append(_outer(small_b, g, mask))
        if self._cotangent == self._n_cotangents - 1:
            self._add(2 * site, torch.stack(self._small_a.pop(site), 1), x[:, None], mask)
            jacobian = torch.stack(self._jacobian_b.pop(site), 1)  # [N, K, r, d]: as if each row were a token
            rows = torch.eye(jacobian.shape[2], dtype=dtype, device=g.device).expand(len(g), 1, -1, -1)
            self._add(2 * site + 1, rows, jacobian, None)

    def _add(self, index: int, small: Tensor, large: Tensor, mask: Tensor | None) -> None:
        block = self._blocks[index]
        complete = block.large.rank == block.large.dim
        basis = block.large.vectors.to(small.dtype)  # the fit may have been in another precision
        projected, row_grams = lk.jacobian_stats(small, large, basis, mask, row_grams=not complete)
        cov = block.variances(projected, row_grams, self._prior_precisions[index].to(projected.device))
        if self._covariance is None:
            self._covariance = cov.new_zeros(max(self._parts) + 1, *cov.shape)
        self._covariance[self._parts[index]] += cov.to(self._covariance.device)


def _outer(small: Tensor, large: Tensor, mask: Tensor | None) -> Tensor:
    """Sum over real tokens of small (x) large: [N, T, r], [N, T, d] -> [N, r, d]."""
    if mask is not None:
        small, large = small.where(mask[..., None], 0), large.where(mask[..., None], 0)
    return small.mT @ large.to(small.dtype)
