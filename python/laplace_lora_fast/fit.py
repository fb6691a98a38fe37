"""The one pass over the training data that a fit is."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import laplace_kernels as lk
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError, LaplaceWarning
from laplace_lora_fast.heads import Head, device_of
from laplace_lora_fast.kfac import KfacAccumulator
from laplace_lora_fast.likelihoods import Fisher, Likelihood, fisher_cotangents
from laplace_lora_fast.posterior import KronBlock
from laplace_lora_fast.progress import track
from laplace_lora_fast.taps import Site, Tap


@dataclass(frozen=True)
class Fit:
    """What one pass over the data leaves.

    Attributes:
        blocks: curvature of every LoRA weight at unit noise, A before B, site by site.
        groups: for each site the site whose input it shares.
        n_examples: N.
        n_outputs: C.
        log_likelihood: sum of log p(y | f) at unit noise; None if some batch had no labels.
    """

    blocks: list[KronBlock]
    groups: list[int]
    n_examples: int
    n_outputs: int
    log_likelihood: float | None


def fit_kfac(
    model: nn.Module,
    head: Head,
    sites: Sequence[Site],
    loader: Iterable[Mapping[str, Any]],
    likelihood: Likelihood,
    fisher: Fisher,
    accumulator: KfacAccumulator,
    *,
    rank: int | None,
    mc_samples: int,
    seed: int,
    progress: bool,
) -> Fit:
    """Accumulates KFAC factors over a loader, one forward and K backward passes a batch, and eigendecomposes them.

    Args:
        model: the model.
        head: its logits.
        sites: its LoRA layers.
        loader: batches.
        likelihood: of the logits.
        fisher: which Fisher information.
        accumulator: empty.
        rank: leading eigenpairs to keep; None for all of a dense factor.
        mc_samples: labels drawn per example for the sampled Fisher.
        seed: of the sampled Fisher.
        progress: show a bar.

    Raises:
        InvalidBatchError: the loader is empty or a batch is unusable.
        NumericalError: a layer's curvature is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    checks, device = DeferredChecks(), device_of(model)
    n_examples = n_outputs = 0
    log_likelihood: torch.Tensor | None = torch.zeros((), dtype=torch.float64)
    with Tap(model, head, list(sites), accumulator) as tap:
        for index, batch in enumerate(track(loader, "fit", progress)):
            inputs = head.inputs(batch, device, checks)
            logits = tap.forward(inputs)
            if index == 0:
                assert tap.groups is not None
                accumulator.start(tap.groups)
                n_outputs = logits.shape[1]
            if logits.shape[1] != n_outputs:
                raise InvalidBatchError(
                    f"batch {index} gives {logits.shape[1]} logits per example, the first one gave {n_outputs}"
                )
            outputs = logits.detach().to(lk.accumulation_dtype(logits.dtype))
            likelihood.check(outputs)
            checks.require(outputs.isfinite().all(), f"batch {index} gives logits that are not finite")
            targets = likelihood.targets(inputs.labels, outputs, checks)
            cotangents = fisher_cotangents(likelihood, fisher, outputs, targets, generator, mc_samples)
            for k in range(cotangents.shape[2]):
                tap.backward(logits, cotangents[:, :, k], last=k == cotangents.shape[2] - 1)
            n_examples += inputs.batch_size
            if targets is None or log_likelihood is None:
                log_likelihood = None
            else:
                log_likelihood = log_likelihood.to(outputs.device) + likelihood.log_likelihood(
                    outputs, targets
                )
    if n_examples == 0:
        raise InvalidBatchError("train_loader yielded no batch")
    checks.settle()
    idle = [site.name for index, site in enumerate(sites) if index not in tap.reached]
    if idle:
        warnings.warn(
            f"no gradient reached {idle}: their posterior is the prior", LaplaceWarning, stacklevel=3
        )
    assert tap.groups is not None
    return Fit(
        blocks=accumulator.blocks(rank),
        groups=tap.groups,
        n_examples=n_examples,
        n_outputs=n_outputs,
        log_likelihood=None if log_likelihood is None else float(log_likelihood),
    )
