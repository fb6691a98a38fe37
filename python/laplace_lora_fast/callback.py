"""A callback for transformers' Trainer that fits the posterior when training ends. The only file that imports it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from laplace_lora_fast.devices import device_of
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError
from laplace_lora_fast.heads import Head
from laplace_lora_fast.laplace import LaplaceLoRA
from laplace_lora_fast.modes import checkpointing_layers, evaluation_mode


class LaplaceCallback(TrainerCallback):
    """Fits a Laplace posterior when training ends, tunes its prior, and saves it beside the adapter.

        callback = LaplaceCallback(answer_token_ids=ids, eval_data=held_out)
        Trainer(model=peft_model, ..., callbacks=[callback]).train()
        callback.laplace.predict(batch)             # or later: LaplaceLoRA.load(args.output_dir, model)

    Batches come from the Trainer's own collator, in evaluation batch size, each example once. Causal models may have
    token-level labels, as TRL's collators make them: see `answer_batch`. Several processes fit together, each on its
    share of the training data, unless that is a DataLoader or has fewer examples than there are processes: then each
    fits on all of it. The first one saves.

    Args:
        train_data: what to fit on: None for the Trainer's training set, another data set of the same kind, or a
            DataLoader.
        eval_data: what to tune the prior on, likewise; None for the Trainer's evaluation set, which it has to evaluate
            during training for this.
        method: "val_nll", "marglik", "loo" (with the option mean="refit"), or None to keep `prior_precision`.
        prior_structure: as for `LaplaceLoRA.optimize_prior_precision`.
        folder: where adapter and posterior go; None for the Trainer's `output_dir`.
        options: what `LaplaceLoRA` takes beside the model.

    Attributes:
        laplace: the fitted posterior; None before the end of training.

    Raises:
        TypeError: `LaplaceLoRA` takes no such option.
        ValueError: when training begins: an option is wrong, or there is nothing to tune the prior on.
        InvalidBatchError: when training begins: a first batch holds no answers, or gives no logits [N, C].
        UnsupportedAdapterError: when training begins: the model has no LoRA layer that can be treated.
    """

    def __init__(
        self,
        *,
        train_data: Any = None,
        eval_data: Any = None,
        method: str | None = "val_nll",
        prior_structure: str = "scalar",
        folder: str | PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        if method not in ("val_nll", "marglik", "loo", None):
            raise ValueError(f"method must be 'val_nll', 'marglik', 'loo' or None, got {method!r}")
        if method == "loo" and options.get("mean") != "refit":
            raise ValueError("method='loo' needs mean='refit'")
        inspect.signature(LaplaceLoRA).bind(None, **options)
        self.laplace: LaplaceLoRA | None = None
        self._train_data, self._eval_data = train_data, eval_data
        self._method, self._prior_structure = method, prior_structure
        self._folder, self._options = folder, options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses what could not work, before hours of training."""
        LaplaceLoRA(kwargs["model"], **self._options)
        if self._method == "val_nll" and self._eval_data is None and args.eval_strategy == "no":
            raise ValueError(
                "method='val_nll' needs eval_data, or a Trainer that evaluates (eval_strategy); "
                "method='loo' with mean='refit', and 'marglik', need no held-out data"
            )
        own = kwargs["train_dataloader"]
        self._try(kwargs["model"], self._batches(self._train_data, own, own, args))
        if self._method == "val_nll" and self._eval_data is not None:
            self._try(kwargs["model"], self._batches(self._eval_data, None, own, args))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Saves, fits, saves, tunes, saves: a failure costs no more than its own step."""
        model, own = kwargs["model"], kwargs["train_dataloader"]
        folder = str(args.output_dir if self._folder is None else self._folder)
        progress, saves = not args.disable_tqdm, state.is_world_process_zero
        if saves:
            model.save_pretrained(folder)
        self.laplace = LaplaceLoRA(model, **self._options)
        loader = self._batches(self._train_data, own, own, args, shared=True)
        self.laplace.fit(loader, group=loader.group, progress=progress)
        if saves:
            self.laplace.save(folder)
        if self._method is None:
            return
        held_out = None
        if self._method == "val_nll":
            held_out = self._batches(self._eval_data, kwargs["eval_dataloader"], own, args)
        self.laplace.optimize_prior_precision(
            self._method, prior_structure=self._prior_structure, val_loader=held_out, progress=progress
        )
        if saves:
            self.laplace.save(folder)

    def _try(self, model: Any, batches: _Batches) -> None:
        """A first batch through the head, which changes neither the model nor what training will draw."""
        if isinstance(batches.dataset, IterableDataset):  # a look might take its first examples away
            return
        head = Head(model, self._options.get("answer_token_ids"), self._options.get("output_fn"))
        with (
            torch.random.fork_rng(devices=[]),  # a DataLoader draws a seed
            torch.no_grad(),
            evaluation_mode(model, checkpointing_layers(model)),
            head.installed(),
        ):
            inputs = head.inputs(next(iter(batches)), device_of(model), DeferredChecks())
            head.logits(model, inputs)

    def _batches(
        self,
        data: Any,
        default: DataLoader | None,
        own: DataLoader,
        args: TrainingArguments,
        shared: bool = False,
    ) -> _Batches:
        """Loader over `data` (None for the data set of `default`), or this process's share, with `own`'s collator."""
        group = sampler = None
        if isinstance(data, DataLoader):
            loader = data
        else:
            if data is None and default is None:
                raise ValueError("the Trainer has not evaluated: pass eval_data to LaplaceCallback")
            data = default.dataset if data is None else data  # type: ignore[union-attr]
            if isinstance(data, IterableDataset) and args.world_size > 1:
                raise ValueError(
                    "the Trainer shards an iterable data set over processes: pass train_data and eval_data"
                )
            columns = getattr(own.dataset, "column_names", None)
            if columns and hasattr(data, "select_columns"):  # the Trainer dropped the columns no model takes
                data = data.select_columns([name for name in columns if name in data.column_names])
            if shared and args.world_size > 1 and len(data) >= args.world_size:
                group = torch.distributed.group.WORLD
                sampler = range(args.process_index, len(data), args.world_size)
            size = args.per_device_eval_batch_size
            loader = DataLoader(data, batch_size=size, sampler=sampler, collate_fn=own.collate_fn)
        return _Batches(loader, self._options.get("answer_token_ids"), group)


class _Batches:
    """A loader's batches, through `answer_batch` where there are answers; whole, or this rank's share of a group."""

    def __init__(
        self, loader: DataLoader, answers: Sequence[int] | None, group: torch.distributed.ProcessGroup | None
    ) -> None:
        self._loader, self._answers, self.group = loader, answers, group

    @property
    def dataset(self) -> Any:
        return self._loader.dataset

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self._loader:
            yield batch if self._answers is None else answer_batch(batch, self._answers)


def answer_batch(batch: Mapping[str, Any], answer_token_ids: Sequence[int]) -> Mapping[str, Any]:
    """Turns token-level labels [N, T] of a causal model into prompts and class indices [N].

    The answer of an example is its last labelled token (labels are -100 elsewhere) among `answer_token_ids`: what
    follows it, an end-of-sequence token say, is cut off with it, so that the prompt's last position predicts it.

    Args:
        batch: `input_ids`, `labels`, and `attention_mask` if there are pads.
        answer_token_ids: the classes, in this order.

    Returns:
        The batch cut to the prompts, with `attention_mask` and `labels` [N]. A batch whose labels are not [N, T] is
        returned as it is.

    Raises:
        InvalidBatchError: an example has no answer among its labels, or nothing before it; or sequences are packed.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return batch
    mask = batch.get("attention_mask")
    if mask is None and "position_ids" in batch:
        raise InvalidBatchError(
            "a batch packs several examples into one sequence: collate with padding instead"
        )
    answers = torch.as_tensor(list(answer_token_ids), device=labels.device)
    classes = labels[:, :, None] == answers
    is_answer = classes.any(2)
    if not is_answer.any(1).all():
        row = int((~is_answer.any(1)).nonzero()[0])
        raise InvalidBatchError(
            f"example {row} of a batch has none of answer_token_ids among its labels: with and without a space before "
            "it a word is not the same token"
        )
    length = labels.shape[1]
    positions = torch.arange(length, device=labels.device)
    place = (is_answer * positions).amax(1)
    prompt = positions < place[:, None]
    if mask is not None:
        prompt = prompt & (mask != 0)
    if not prompt.any(1).all():
        row = int((~prompt.any(1)).nonzero()[0])
        raise InvalidBatchError(f"example {row} of a batch has no token before its answer")
    cut = int(place.max())
    kept = {
        name: value[:, :cut] if isinstance(value, Tensor) and value.shape[:2] == labels.shape else value
        for name, value in batch.items()
    }
    rows = torch.arange(len(labels), device=labels.device)
    return kept | {"attention_mask": prompt[:, :cut].long(), "labels": classes[rows, place].int().argmax(1)}
