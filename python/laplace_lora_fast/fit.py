"""Passes over the training data."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kernels as lk
from laplace_lora_fast.curvature import Curvature
from laplace_lora_fast.devices import device_of
from laplace_lora_fast.distributed import Ranks
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError, LaplaceWarning
from laplace_lora_fast.heads import Head, Inputs, check_outputs
from laplace_lora_fast.likelihoods import Fisher, Likelihood, fisher_cotangents
from laplace_lora_fast.progress import track
from laplace_lora_fast.taps import Site, Tap


class Accumulator(ABC):
    """Observer (see streams.py) that makes a curvature out of Fisher-weighted streams."""

    def start(self, groups: list[int]) -> None:
        """After the first forward pass, which tells which sites share their input."""

    def start_batch(self, tap: Tap, inputs: Inputs, targets: Tensor | None) -> None:
        """Between the forward pass of a batch and its backward passes."""

    def directions(self, fisher: Tensor) -> Tensor:
        """What to send back from the logits, [N, C, K]: the Fisher cotangents [N, C, K], or what replaces them."""
        return fisher

    def finish_pass(self, n: int) -> None:
        """After each backward pass over n examples."""

    def finish_batch(self) -> None:
        """After each batch."""

    @abstractmethod
    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> None: ...

    @abstractmethod
    def observe_gradient(self, site: int, g: Tensor, mask: Tensor | None) -> None: ...

    @abstractmethod
    def join(self, ranks: Ranks) -> None:
        """After the last batch: takes in what the other ranks have accumulated."""

    @abstractmethod
    def curvature(self) -> Curvature:
        """After `join`. Raises NumericalError if something is not finite."""


@dataclass(frozen=True)
class Fit:
    """What a fit leaves.

    Attributes:
        curvature: of the LoRA weights, at unit noise.
        groups: for each site the site whose input it shares.
        n_examples: N.
        n_outputs: C.
        log_likelihood: sum of log p(y | f) at unit noise; None if some batch had no labels.
        reason: why its structure was chosen, where the caller left that open.
    """

    curvature: Curvature
    groups: list[int]
    n_examples: int
    n_outputs: int
    log_likelihood: float | None
    reason: str = ""


@dataclass(frozen=True)
class Pass:
    """What a pass over one rank's data saw.

    Attributes:
        groups: for each site the site whose input it shares.
        reached: for each site whether a gradient came there.
        n_examples: N.
        n_outputs: C.
        log_likelihood: None if some batch had no labels.
    """

    groups: list[int]
    reached: list[bool]
    n_examples: int
    n_outputs: int
    log_likelihood: Tensor | float | None


@dataclass(frozen=True)
class Objective:
    """What is differentiated: a model's logits under a likelihood.

    Attributes:
        model: the model.
        head: its logits.
        sites: its LoRA layers.
        likelihood: of the logits.
        fisher: which Fisher information.
        mc_samples: labels drawn per example for the sampled Fisher.
        seed: of the sampled Fisher.
        ranks: over which the data are spread.
    """

    model: nn.Module
    head: Head
    sites: Sequence[Site]
    likelihood: Likelihood
    fisher: Fisher
    mc_samples: int
    seed: int
    ranks: Ranks = field(default_factory=Ranks)

    def accumulate(
        self, loader: Iterable[Mapping[str, Any]], accumulator: Accumulator, what: str, progress: bool
    ) -> Fit:
        """One pass over a loader: a forward and K backward passes a batch, K the rank of the Fisher information.

        Args:
            loader: batches; with several ranks, this one's.
            accumulator: empty.
            what: name of the progress bar.
            progress: show it.

        Raises:
            InvalidBatchError: the loader is empty or a batch is unusable.
            NumericalError: a layer's curvature is not finite.
            RankError: another rank failed, or holds another model.
        """
        with self.ranks.together():
            seen = self.observe(loader, accumulator, what, progress)
        self._require_same_model(seen)
        accumulator.join(self.ranks)
        with torch.autocast(device_of(self.model).type, enabled=False):
            curvature = accumulator.curvature()
        reached = self.ranks.gather_numbers(seen.reached).any(0)
        self._warn_of_idle_sites([site for site, there in zip(self.sites, reached, strict=True) if not there])
        log_likelihood = None if seen.log_likelihood is None else float(seen.log_likelihood)
        totals = self.ranks.gather_numbers(
            [seen.n_examples, math.nan if log_likelihood is None else log_likelihood]
        )
        n_examples, log_likelihood = totals.sum(0).tolist()
        return Fit(
            curvature=curvature,
            groups=seen.groups,
            n_examples=int(n_examples),
            n_outputs=seen.n_outputs,
            log_likelihood=None if math.isnan(log_likelihood) else log_likelihood,
        )

    def observe(
        self, loader: Iterable[Mapping[str, Any]], accumulator: Accumulator, what: str, progress: bool
    ) -> Pass:
        """The pass of `accumulate` on this rank alone."""
        # The generator takes the lowest 32 bits of a seed: ranks have to differ there.
        generator = torch.Generator().manual_seed(self.seed + 0x9E3779B9 * self.ranks.rank)
        checks, device = DeferredChecks(), device_of(self.model)
        n_examples = n_outputs = 0
        log_likelihood: Tensor | float | None = 0.0
        progress = progress and self.ranks.rank == 0
        with Tap(self.model, self.head, list(self.sites), accumulator) as tap:
            for index, batch in enumerate(track(loader, what, progress)):
                inputs = self.head.inputs(batch, device, checks)
                logits = tap.forward(inputs)
                if index == 0:
                    assert tap.groups is not None
                    accumulator.start(tap.groups)
                    n_outputs = logits.shape[1]
                check_outputs(logits, n_outputs)
                tap.check_rows(logits)
                outputs = logits.detach().to(lk.accumulation_dtype(logits.dtype))
                self.likelihood.check(outputs)
                checks.require(outputs.isfinite().all(), f"batch {index} gives logits that are not finite")
                targets = self.likelihood.targets(inputs.labels, outputs, checks)
                accumulator.start_batch(tap, inputs, targets)
                fisher = fisher_cotangents(
                    self.likelihood, self.fisher, outputs, targets, generator, self.mc_samples
                )
                cotangents = accumulator.directions(fisher)
                for k in range(cotangents.shape[2]):
                    tap.backward(logits, cotangents[:, :, k], last=k == cotangents.shape[2] - 1)
                    accumulator.finish_pass(inputs.batch_size)
                accumulator.finish_batch()
                n_examples += inputs.batch_size
                if targets is None or log_likelihood is None:
                    log_likelihood = None
                else:
                    log_likelihood = log_likelihood + self.likelihood.log_likelihood(outputs, targets)
            checks.settle()
        if n_examples == 0:
            raise InvalidBatchError("train_loader yielded no batch")
        assert tap.groups is not None
        reached = [index in tap.reached for index in range(len(self.sites))]
        return Pass(tap.groups, reached, n_examples, n_outputs, log_likelihood)

    def _require_same_model(self, seen: Pass) -> None:
        if self.ranks.size == 1:
            return
        norms = [float(weight.double().norm()) for site in self.sites for weight in (site.A, site.B)]
        self.ranks.require_same([len(norms)], "their number of LoRA layers")
        self.ranks.require_same(norms, "the adapter's weights: give them all the same model")
        structure = [seen.n_outputs, *seen.groups]
        self.ranks.require_same(structure, "the number of outputs or which layers share an input")

    def _warn_of_idle_sites(self, idle: Sequence[Site]) -> None:
        if idle:
            names = [site.name for site in idle]
            warnings.warn(
                f"no gradient reached {names}: their posterior is the prior", LaplaceWarning, stacklevel=4
            )
