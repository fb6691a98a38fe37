"""BAG (BayesAdapt): a trainer that answers with a posterior of this package.

    python evaluate.py +lora=default lora.load_mle_checkpoint=True trainer=default \
        trainer._target_=laplace_lora_fast.integrations.bayesadapt.LaplaceTrainer

fits on the host's training set, on the adapter that its `mle` run has left, and writes the host's own results. Options
stand under `+laplace`: `+laplace.structure=kfac`, `+laplace.tuning=evidence`, `+laplace.prior_precision=10`.
Written for github.com/SRI-CSL/BayesAdapt at 3843000; checked with its `Trainer`, on a model of its `load_lora`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_lora_fast.integrations.hosts import require_interface
from laplace_lora_fast.laplace import LaplaceLoRA
from laplace_lora_fast.prior.evidence import Evidence
from laplace_lora_fast.tasks import Answers

try:
    from bayesadapt.trainers.trainer import Trainer
except ImportError as error:
    raise ImportError(
        f"BayesAdapt cannot be imported ({error}): run from a checkout of github.com/SRI-CSL/BayesAdapt"
    ) from error

require_interface(
    Trainer,
    [
        "compute_logits",
        "evaluate_step",
        "evaluate",
        "wrapper_name",
        "expdir",
        "load_dataloaders",
        "load_lora",
    ],
    "BayesAdapt at 3843000",
)


@dataclass(frozen=True)
class _Labelled:
    """A loader of the host's triples as batches with labels."""

    loader: Any

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({**inputs, "labels": labels} for inputs, labels, _ in self.loader)


class LaplaceTrainer(Trainer):
    """Fits before the first evaluation; nothing is trained.

    The host's head holds the rows of the answers alone, so that these are answers 0 to C - 1. What the host averages
    over samples is one sample here: the log of the predictive probabilities.
    """

    la: LaplaceLoRA | None = None

    @property
    def wrapper_name(self) -> str:
        """Of the folder of results."""
        return "laplace_fast"

    def posterior(self) -> LaplaceLoRA:
        """The posterior, fitted on the host's training set when it is first asked for.

        Raises:
            ValueError: an option under `laplace` is none.
        """
        if self.la is None:
            options: Mapping[str, Any] = dict(self.cfg.get("laplace") or {})
            unknown = set(options) - {"structure", "tuning", "prior_precision"}
            if unknown:
                raise ValueError(
                    f"laplace.{min(unknown)} is no option: structure, tuning and prior_precision are"
                )
            if "tuning" in options and "prior_precision" in options:
                raise ValueError(
                    "laplace.tuning chooses the prior precision: leave laplace.prior_precision out"
                )
            if options.get("tuning", "evidence") != "evidence":
                raise ValueError(
                    f"laplace.tuning must be evidence, got {options['tuning']!r}: no rows are held out"
                )
            task = Answers(range(len(self.class_ids)))
            la = LaplaceLoRA(
                self.model, task, structure=options.get("structure", "auto"), seed=int(self.cfg.seed)
            )
            la.fit(_Labelled(self.trainloader))
            if "prior_precision" in options:
                la.prior_precision = float(options["prior_precision"])
            else:
                la.optimize_prior_precision(Evidence())
            self.la = la
        return self.la

    def compute_logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Log of the predictive probabilities, [B, 1, C]."""
        if self.model.training:
            logits: Tensor = super().compute_logits(inputs)
            return logits
        return self.posterior().predict(dict(inputs)).log()[:, None]

    def evaluate_step(self, batch: tuple[Any, ...]) -> dict[str, Any]:
        """As the host's, but with gradients, which its inference mode forbids; milliseconds and bytes."""
        self.posterior()  # outside what is timed
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        logits = self.compute_logits(batch[0])
        if on_gpu:
            torch.cuda.synchronize()
        return {
            "logits": logits,
            "elapsed_time": 1000 * (time.perf_counter() - start),
            "peak_memory": torch.cuda.max_memory_allocated(self.device) if on_gpu else 0,
        }
