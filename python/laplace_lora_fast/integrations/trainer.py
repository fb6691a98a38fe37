"""A callback for transformers' Trainer that fits the posterior when training ends. The only file that imports it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from laplace_lora_fast.errors import InvalidBatchError
from laplace_lora_fast.fitting.passes import Subject, run
from laplace_lora_fast.laplace import LaplaceLoRA
from laplace_lora_fast.model.contexts import unwrapped
from laplace_lora_fast.options import named
from laplace_lora_fast.prior.held_out import HeldOut
from laplace_lora_fast.prior.leave_one_out import LeaveOneOut
from laplace_lora_fast.prior.tuning import Tuning
from laplace_lora_fast.structures import Structure
from laplace_lora_fast.structures.base import Ability
from laplace_lora_fast.tasks import Answers, Preference, Task

HELD_OUT = "held_out"
_NOT_LABELLED = -100  # by the convention of transformers


class LaplaceCallback(TrainerCallback):
    """Fits a Laplace posterior when training ends, tunes its prior, and saves it beside the adapter.

        callback = LaplaceCallback(Answers(token_ids), eval_data=held_out)
        Trainer(model=peft_model, ..., callbacks=[callback]).train()
        callback.laplace.predict(batch)             # or later: LaplaceLoRA.load(args.output_dir, model)

    Batches come from the Trainer's own collator, in evaluation batch size, each example once. Causal models may have
    token-level labels, as TRL's collators make them: see `answer_batch`; the pairs of its RewardTrainer are taken too.
    Tasks with batches of their own, as those of `data.option_batches`, need
    `train_data=DataLoader(batches, batch_size=None)`. Several processes fit together, each on its
    share of the training data, unless that is a DataLoader or has fewer examples than there are processes: then each
    fits on all of it. The first one saves.

    Args:
        task: what the model answers, as for `LaplaceLoRA`.
        train_data: what to fit on: None for the Trainer's training set, another data set of the same kind, or a
            DataLoader.
        eval_data: what to tune the prior on, likewise; None for the Trainer's evaluation set, which it has to evaluate
            during training for this.
        tuning: how the prior precision is chosen: "held_out", on `eval_data`; an object such as `Evidence()`
            (best with `structure=Rows(refit=True)`) or `HeldOut(loader, per="side")`; or None to keep
            `prior_precision`.
        folder: where adapter and posterior go; None for the Trainer's `output_dir`.
        options: what `LaplaceLoRA` takes beside the model and the task.

    Attributes:
        laplace: the fitted posterior; None before the end of training.

    Raises:
        TypeError: `LaplaceLoRA` takes no such option, or `task` or `tuning` is something else.
        ValueError: an option is wrong or would not be looked at; when training begins: or there is nothing to tune the
            prior on.
        InvalidBatchError: when training begins: a first batch holds no answers, or gives no logits [N, C].
        UnsupportedAdapterError: when training begins: the model has no LoRA layer that can be treated.
    """

    def __init__(
        self,
        task: Task | str,
        *,
        train_data: Any = None,
        eval_data: Any = None,
        tuning: Tuning | str | None = HELD_OUT,
        folder: str | PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        self.laplace: LaplaceLoRA | None = None
        self._task: Task = named("task", task, Task)
        inspect.signature(LaplaceLoRA).bind(None, self._task, **options)
        self._holds_out = tuning == HELD_OUT
        self._tuning: Tuning | None = (
            None if tuning is None or self._holds_out else named("tuning", tuning, Tuning)
        )
        if eval_data is not None and not self._holds_out:
            raise ValueError(f"eval_data is what tuning='held_out' looks at, got tuning={tuning!r}")
        self._train_data, self._eval_data = train_data, eval_data
        self._folder, self._options = folder, options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses what could not work, before hours of training."""
        la = self._new(kwargs["model"])
        if self._holds_out and self._eval_data is None and args.eval_strategy == "no":
            raise ValueError(
                "tuning='held_out' needs eval_data, or a Trainer that evaluates (eval_strategy); Evidence() with "
                "structure=Rows(refit=True) needs no held-out data"
            )
        if isinstance(self._tuning, LeaveOneOut):
            structure = la.structure
            if not isinstance(structure, Structure) or Ability.LEAVE_ONE_OUT not in structure.abilities:
                raise ValueError(f"LeaveOneOut needs structure=Rows(refit=True), got {structure!r}")
        own = kwargs["train_dataloader"]
        self._try(la, self._batches(self._train_data, own, own, args))
        if self._holds_out and self._eval_data is not None:
            self._try(la, self._batches(self._eval_data, None, own, args))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Saves, fits, saves, tunes, saves: a failure costs no more than its own step."""
        model, own = kwargs["model"], kwargs["train_dataloader"]
        folder = str(args.output_dir if self._folder is None else self._folder)
        progress, saves = not args.disable_tqdm, state.is_world_process_zero
        if saves:
            model.save_pretrained(folder)
        self.laplace = self._new(model)
        loader = self._batches(self._train_data, own, own, args, shared=True)
        self.laplace.fit(loader, group=loader.group, progress=progress)
        if saves:
            self.laplace.save(folder)
        tuning = self._tuning
        if self._holds_out:
            tuning = HeldOut(self._batches(self._eval_data, kwargs["eval_dataloader"], own, args))
        elif isinstance(tuning, HeldOut):
            tuning = replace(tuning, loader=_Batches(tuning.loader, self._task))
        if tuning is None:
            return
        self.laplace.optimize_prior_precision(tuning, progress=progress)
        if saves:
            self.laplace.save(folder)

    def _new(self, model: Any) -> LaplaceLoRA:
        return LaplaceLoRA(model, self._task, **self._options)

    def _try(self, la: LaplaceLoRA, batches: _Batches) -> None:
        """A first batch through the model, which changes neither it nor what training will draw."""
        if isinstance(batches.dataset, IterableDataset):  # a look might take its first examples away
            return
        head = self._task.head(unwrapped(la.model))
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed
            first = next(iter(batches))
            subject = Subject(la.model, head, la.layers, la.likelihood)
            run(subject, [first], None, lambda step: None, generator=torch.Generator())

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
        return _Batches(loader, self._task, group)


class _Batches:
    """A loader's batches as the task has them; whole, or this rank's share of a group."""

    def __init__(
        self,
        loader: Iterable[Mapping[str, Any]],
        task: Task,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        self._loader, self._task, self.group = loader, task, group

    @property
    def dataset(self) -> Any:
        return getattr(self._loader, "dataset", None)

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self._loader:
            if isinstance(self._task, Answers):
                yield answer_batch(batch, self._task.spellings)
            elif isinstance(self._task, Preference):
                yield pair_batch(batch)
            else:
                yield batch


def pair_batch(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Turns a batch of TRL's RewardTrainer, all chosen texts before all rejected ones, into one of `Preference`.

    Args:
        batch: `input_ids` [2 N, T] and `attention_mask`. One with "group" is returned as it is.

    Raises:
        InvalidBatchError: there is an odd number of sequences.
    """
    if "group" in batch or not isinstance(batch.get("input_ids"), Tensor):
        return batch
    pairs, odd = divmod(len(batch["input_ids"]), 2)
    if odd:
        raise InvalidBatchError(
            "a batch of pairs has an odd number of sequences: expected chosen, then rejected"
        )
    group = torch.arange(pairs).repeat(2)
    kept = {name: value for name, value in batch.items() if name != "margin"}
    return kept | {"group": group, "labels": torch.zeros(pairs, dtype=torch.long)}


def answer_batch(batch: Mapping[str, Any], token_ids: Sequence[int | Sequence[int]]) -> Mapping[str, Any]:
    """Turns token-level labels [N, T] of a causal model into prompts and class indices [N].

    The answer of an example is its first labelled token: labels are -100 before it. What follows the answer, an
    end-of-sequence token or a reason say, is cut off with it, so that the prompt's last position predicts it.

    Args:
        batch: `input_ids`, `labels`, and `attention_mask` if there are pads.
        token_ids: the answers, in the order of the classes; several tokens of one that they all spell.

    Returns:
        The batch cut to the prompts, with `attention_mask` and `labels` [N]. A batch whose labels are not [N, T] is
        returned as it is.

    Raises:
        InvalidBatchError: an example has no label, its first is none of the answers, or there is nothing before it;
            or sequences are packed.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return batch
    mask = batch.get("attention_mask")
    if mask is None and "position_ids" in batch:
        raise InvalidBatchError(
            "a batch packs several examples into one sequence: collate with padding instead"
        )
    real = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask != 0
    labelled = (labels != _NOT_LABELLED) & real
    _refuse(~labelled.any(1), "has no labelled token")
    place = labelled.int().argmax(1)
    first = labels.gather(1, place[:, None])
    spelled = [
        (place, t) for place, a in enumerate(token_ids) for t in ([a] if hasattr(a, "__index__") else a)
    ]
    classes, tokens = torch.tensor(spelled, device=labels.device).unbind(1)
    is_answer = first == tokens
    shown = [a if hasattr(a, "__index__") else a[0] if len(a) == 1 else list(a) for a in token_ids]
    _refuse(
        ~is_answer.any(1),
        "has token {} as its first labelled one, which is none of the answers " + f"{shown}: "
        "labels must be -100 before the answer, and with and without a space before it a word is not the same token",
        first,
    )
    prompt = real & (torch.arange(labels.shape[1], device=labels.device) < place[:, None])
    _refuse(~prompt.any(1), "has no token before its answer")
    cut = int(place.max())
    kept = {
        name: value[:, :cut] if isinstance(value, Tensor) and value.shape[:2] == labels.shape else value
        for name, value in batch.items()
    }
    return kept | {"attention_mask": prompt[:, :cut].long(), "labels": classes[is_answer.int().argmax(1)]}


def _refuse(bad: Tensor, message: str, found: Tensor | None = None) -> None:
    """Raises InvalidBatchError for the first example that is bad, with what was found there."""
    if bad.any():
        row = int(bad.int().argmax())
        said = message if found is None else message.format(int(found[row]))
        raise InvalidBatchError(f"example {row} of a batch {said}")
