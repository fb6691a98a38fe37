"""bayesian-peft (BLoB, TFB): a model wrapper whose evaluation asks a posterior of this package.

A file modelwrappers/laplacefast.py in the host's checkout, with the line

    from laplace_lora_fast.integrations.bayesian_peft import LaplaceFast, get_parser

makes `--modelwrapper laplacefast` one of its methods: it trains as the host's `mle`, fits when training has ended, and
the last evaluation is that of the posterior. Written for github.com/Wang-ML-Lab/bayesian-peft at bc6a4a7.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laplace_lora_fast.integrations.hosts import require_interface
from laplace_lora_fast.laplace import LaplaceLoRA
from laplace_lora_fast.prior.evidence import Evidence
from laplace_lora_fast.saving.posterior import FILE_NAME
from laplace_lora_fast.tasks import Answers

try:
    from modelwrappers.wrapperbase import WrapperBase
    from utils.args import ArgumentParser, add_experiment_args, add_management_args
except ImportError as error:
    raise ImportError(
        f"bayesian-peft cannot be imported ({error}): run from a checkout of github.com/Wang-ML-Lab/bayesian-peft"
    ) from error

require_interface(
    WrapperBase, ["forward_logits", "fit", "evaluate", "prepare_for_fit_evaluate"], "bayesian-peft at bc6a4a7"
)


def get_parser() -> Any:
    """The host's arguments and this method's own."""
    parser = ArgumentParser(description="Laplace posterior of an MLE adapter")
    add_management_args(parser)
    add_experiment_args(parser)
    parser.add_argument(
        "--laplace-structure", default="auto", help="auto, rows, low_rank, kfac, ekfac, diagonal"
    )
    parser.add_argument(
        "--laplace-posterior",
        default=None,
        help="folder: a posterior that is there is loaded, as out of distribution; otherwise it is written",
    )
    return parser


@dataclass(frozen=True)
class _Labelled:
    """A loader of the host's triples as batches with labels."""

    loader: Any

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({**inputs, "labels": classes} for inputs, classes, _ in self.loader)


class LaplaceFast(WrapperBase):
    """Trains as the host's MLE; evaluates by the log of the predictive probabilities, [B, 1, C]."""

    def __init__(
        self, model: Any, peft_config: Any, args: Any, accelerator: Any, adapter_name: str = "default"
    ) -> None:
        if args.dataset_type != "mcdataset":
            raise ValueError(
                f"laplacefast answers multiple choice: --dataset-type mcdataset, not {args.dataset_type}"
            )
        super().__init__(model, peft_config, args, accelerator, adapter_name)
        if args.load_lora_path is not None:
            self.load_adapter(args.load_lora_path, adapter_name)
        self._laplace: LaplaceLoRA | None = None
        self._is_training = False

    def forward_logits(self, batch: Any, sample: bool = True, n_samples: int = 1, **_: Any) -> Tensor:
        """The model's own logits while it is trained, behind that the posterior's log probabilities."""
        inputs = batch[0]
        if self._laplace is None or self._is_training:
            logits: Tensor = self.base_model(**inputs).logits[:, -1, self.target_ids]
            return logits.unsqueeze(1)
        with torch.inference_mode(False):  # which the host is in
            return self._laplace.predict(dict(inputs)).log()[:, None]

    def fit(self, train_loader: Any, eval_loader: Any) -> None:
        """An epoch of the host's training; a posterior of earlier weights is forgotten."""
        self._laplace, self._is_training = None, True
        try:
            super().fit(train_loader, eval_loader)
        finally:
            self._is_training = False

    def evaluate(self, eval_loader: Any) -> Any:
        """The host's scores: of the posterior, unless they are asked for amid training."""
        self.eval()
        if not self._is_training and self._laplace is None:
            with torch.inference_mode(False):
                self._laplace = self._fitted()
        return super().evaluate(eval_loader)

    def _fitted(self) -> LaplaceLoRA:
        folder = self.args.laplace_posterior
        if folder is not None and (Path(folder) / FILE_NAME).exists():
            return LaplaceLoRA.load(folder, self)
        group = torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None
        task = Answers([int(token) for token in self.target_ids])
        la = LaplaceLoRA(self, task, structure=self.args.laplace_structure, seed=self.args.seed or 0)
        la.fit(_Labelled(self.train_loader), group=group).optimize_prior_precision(Evidence())
        if folder is not None and self.accelerator.is_local_main_process:
            la.save(folder)
        return la
