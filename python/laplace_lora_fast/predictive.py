"""The linearised predictive over a loader: f ~ N(f*, J (H + Lambda)^-1 J^T)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kernels as lk
from laplace_lora_fast.curvature import Curvature
from laplace_lora_fast.devices import device_of
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError
from laplace_lora_fast.heads import Head, Inputs, check_outputs
from laplace_lora_fast.likelihoods import Likelihood
from laplace_lora_fast.progress import track
from laplace_lora_fast.streams import Observer
from laplace_lora_fast.taps import Site, Tap


@dataclass(frozen=True)
class LinearisedModel:
    """A model, where its LoRA layers are tapped, and the curvature there."""

    model: nn.Module
    head: Head
    sites: Sequence[Site]
    groups: Sequence[int]
    curvature: Curvature
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


def distribution(
    linearised: LinearisedModel,
    prior_precisions: Tensor,
    loader: Iterable[Mapping[str, Any]],
    cotangents: Tensor,
    what: str,
    progress: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gaussian of `logits @ cotangents` over a loader, for several priors in one pass.

    Args:
        linearised: the model and its curvature.
        prior_precisions: fp64 [n_blocks, G].
        loader: batches.
        cotangents: [C, K].
        what: name of the progress bar.
        progress: show it.

    Returns:
        Mean [N, K] ([G, N, K] of refitted models), covariance [G, N, K, K], targets (None if some batch has no labels).

    Raises:
        InvalidBatchError: the loader is empty or a batch is unusable.
    """
    checks, cotangents = DeferredChecks(), cotangents.to(device_of(linearised.model))
    predictor = linearised.curvature.predictor(linearised.sites, prior_precisions, cotangents.shape[1])
    several_priors = prior_precisions.shape[1] > 1
    seen, targets, gaussians = [], [], []
    with linearised.tap(predictor) as tap:
        for inputs in linearised.batches(track(loader, what, progress), checks):
            logits, batch = predictor.run(tap, inputs, cotangents)
            targets.append(_checked_targets(linearised.likelihood, logits, inputs, checks))
            seen.append(batch)
            if not several_priors:
                gaussians.append(predictor.gaussians(seen))
                seen.clear()
        checks.settle()
    if several_priors:
        gaussians.append(predictor.gaussians(seen))
    means, covs = zip(*gaussians, strict=True)
    return torch.cat(means, -2), torch.cat(covs, 1), _joined(targets)


def map_logits(
    linearised: LinearisedModel, loader: Iterable[Mapping[str, Any]], progress: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits [N, C] of the plain model over a loader, and targets as in `distribution`."""
    checks = DeferredChecks()
    all_logits, targets = [], []
    with linearised.tap(None) as tap:
        for inputs in linearised.batches(track(loader, "predict", progress), checks):
            logits = tap.forward(inputs).detach()
            check_outputs(logits, linearised.n_outputs)
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
