"""Batches as transformers makes them: what is in one, which tokens are real, which sequences belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from laplace_lora_fast.devices import to_device
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError

Batch = Mapping[str, Any]

LABEL_KEYS = ("labels", "label")
_NOT_FOR_THE_MODEL = (*LABEL_KEYS, "group")
_OTHER_LABELS = (
    "label_ids",
    "target",
    "targets",
    "y",
)  # what no model takes, and labels are called elsewhere
_PACKED = (  # of collators that pack
    *("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx", "seq_lens", "seq_lengths"),
    *("document_ids", "doc_ids", "segment_ids"),
)
_OF_GENERATION = (
    "past_key_values",
    "logits_to_keep",
    "num_logits_to_keep",
)  # other positions than the batch's
_OF_ALL = (bool, int, float, str, type(None))  # what is no sequence's own
_OF_TOKENS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Inputs:
    """A batch, checked and on the model's device.

    Attributes:
        model: keyword arguments of the model's forward.
        mask: [S, T] bool, True at real tokens; None when every token is real.
        n_sequences: S.
        length: T, or None for inputs that are not token sequences.
        labels: what the batch holds under "labels", or None.
        last: [S] position of each sequence's last real token, or None for inputs that are not token sequences.
        positions: [S, T] number of real tokens before each one, where the model may have to be told them.
        group: [S] the example that each sequence belongs to, on the CPU; None where each is an example.
        own: what the head asked for and the model is not given.
        pads: where the mask, flat, is False, if that could be read without waiting; None with the mask.
    """

    model: dict[str, Any]
    mask: Tensor | None
    n_sequences: int
    length: int | None
    labels: Tensor | None
    last: Tensor | None
    positions: Tensor | None = None
    group: Tensor | None = None
    own: dict[str, Tensor] = field(default_factory=dict)
    pads: Tensor | None = None

    @property
    def n_examples(self) -> int:
        """N."""
        return self.n_sequences if self.group is None else int(self.group.max()) + 1

    def first(self) -> Inputs | None:
        """The first sequence alone, as a copy; None where it cannot be told what is its own."""
        several = self.n_sequences > 1

        def own(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.dim():
                return value
            return value[:1].clone() if several else value.clone()

        parts = [value for value in self.model.values() if not isinstance(value, _OF_ALL)]
        told = all(
            isinstance(part, Tensor) and (not several or part.shape[:1] == (self.n_sequences,))
            for part in parts
        )
        if self.n_sequences < 1 or not parts or not told:
            return None
        return replace(
            self,
            model={key: own(value) for key, value in self.model.items()},
            mask=own(self.mask),
            n_sequences=1,
            labels=None,
            last=own(self.last),
            positions=own(self.positions),
            group=None,
            own={key: own(value) for key, value in self.own.items()},
            pads=None,
        )


def read_batch(
    batch: Batch, device: torch.device, checks: DeferredChecks, grouped: bool, own: Sequence[str] = ()
) -> Inputs:
    """Checks a batch and moves it to `device`; labels stay where they are.

    Args:
        batch: dict of tensors.
        device: the model's.
        checks: takes what cannot be read without waiting.
        grouped: whether examples are groups of sequences, told by "group" [S].
        own: keys of tensors that are the head's, not the model's.

    Raises:
        InvalidBatchError: not a mapping of tensors, empty, or with a sequence that has no real token.
    """
    if not isinstance(batch, Mapping):
        raise InvalidBatchError(
            f"a batch must be a dict of tensors as transformers makes them, got {type(batch)}: pass a loader, or a "
            "list, of such dicts"
        )
    batch = {key: value for key, value in batch.items() if value is not None}
    if batch.get("adapter_names") is not None:
        raise InvalidBatchError(
            "a batch mixes adapters ('adapter_names'): use the model's one active adapter"
        )
    _refuse_keys(batch)
    n, length = _shape(batch)
    if n == 0:
        raise InvalidBatchError("a batch has no examples: leave it out")
    _refuse_tensors(batch, device)
    mask = batch.get("attention_mask")
    last = positions = None
    if mask is not None:
        mask = _checked_mask(mask, n, length, checks)
        positions = mask.long().cumsum(1)
        last = positions.argmax(1)  # the first position that has seen every real token
        if mask.device.type == "cpu" and mask.all():
            mask = None
    elif length is not None:
        last = torch.full((n,), length - 1, device=device)
    _refuse_packed(batch.get("position_ids"), mask, n, checks)
    labels = batch.get("labels", batch.get("label"))
    return Inputs(
        model={
            key: _usable(value, device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
            if key not in (*_NOT_FOR_THE_MODEL, *own)
        },
        mask=None if mask is None else to_device(mask, device),
        n_sequences=n,
        length=length,
        labels=None if labels is None else _numbers(labels),
        last=None if last is None else to_device(last, device),
        positions=None if positions is None or mask is None else (positions - 1).clamp(min=0),
        group=_checked_group(batch.get("group"), n, grouped),
        own={key: _required(batch, key) for key in own},
        pads=None if mask is None or mask.device.type != "cpu" else to_device(_places(~mask), device),
    )


def _places(mask: Tensor) -> Tensor:
    """Where a mask, flat, is True."""
    return mask.flatten().nonzero().flatten()


def _required(batch: Batch, key: str) -> Tensor:
    if not isinstance(batch.get(key), Tensor):
        raise InvalidBatchError(f"a batch of this task needs {key!r}, a tensor")
    value: Tensor = batch[key]
    return value


def _refuse_keys(batch: Batch) -> None:
    other = [key for key in _OTHER_LABELS if key in batch]
    if other and not any(key in batch for key in LABEL_KEYS):
        raise InvalidBatchError(
            f"a batch has {other[0]!r} and no 'labels': rename it to 'labels', or leave it out where there are none"
        )
    packed = [key for key in _PACKED if batch.get(key) is not None]
    if packed:
        raise InvalidBatchError(
            f"a batch packs several examples into one row ({packed[0]!r}): collate with padding instead "
            "(DataCollatorWithPadding; packing=False, padding_free=False in TRL)"
        )
    other = [key for key in _OF_GENERATION if batch.get(key) is not None]
    if other:
        raise InvalidBatchError(
            f"a batch has {other[0]!r}, so that the model gives other positions than the batch has: leave it out"
        )


def _refuse_tensors(batch: Batch, device: torch.device) -> None:
    """Raises InvalidBatchError for tensors without values, and tokens that no embedding takes."""
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.is_meta and device.type != "meta":
            raise InvalidBatchError(
                f"{key!r} is on the meta device, which keeps no values: make batches on another (is there a "
                "torch.set_default_device?)"
            )
        if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_nested):
            raise InvalidBatchError(f"{key!r} is a sparse or a nested tensor: pass padded, dense ones")
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.dtype not in _OF_TOKENS:
        raise InvalidBatchError(f"'input_ids' are {ids.dtype}: pass token ids as torch.int64 or torch.int32")
    if ids is not None and batch.get("inputs_embeds") is not None:
        raise InvalidBatchError("a batch has 'input_ids' and 'inputs_embeds': leave one of them out")


def _numbers(labels: Any) -> Tensor:
    """Labels as a tensor. Raises InvalidBatchError for others than numbers."""
    try:
        found = torch.as_tensor(labels)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidBatchError(
            f"'labels' are no numbers ({error}): pass class indices, or real numbers for a regression"
        ) from error
    if found.is_complex():
        raise InvalidBatchError(f"'labels' are {found.dtype}: pass class indices, or real numbers")
    return found


def _refuse_packed(positions: Any, mask: Tensor | None, n: int, checks: DeferredChecks) -> None:
    """Positions that do not rise inside a row are those of another example there: so do models read them."""
    if not isinstance(positions, Tensor) or positions.dim() > 2:
        return
    if positions.dim() < 2 or positions.shape[0] not in (1, n):
        raise InvalidBatchError(f"position_ids has shape {tuple(positions.shape)}, expected [{n}, T]")
    falls = positions[:, 1:] <= positions[:, :-1]
    if mask is not None:  # what pads have is nobody's business
        if mask.shape[1] != positions.shape[1]:
            return
        real = mask.to(positions.device)
        falls = falls & real[:, 1:] & real[:, :-1]
    checks.require(
        ~falls.any(),
        "'position_ids' start again or stand still inside a row: several examples are packed into it; pass rows of "
        "one example each, collated with padding",
    )


def without_labels(batch: Batch) -> Batch:
    """The batch without labels that nothing would use: test sets often have -1 there."""
    if not isinstance(batch, Mapping):
        return batch
    return {key: value for key, value in batch.items() if key not in (*LABEL_KEYS, *_OTHER_LABELS)}


def _usable(x: Tensor, device: torch.device) -> Tensor:
    """On `device`, outside any graph of the caller's, and fit for one: a tensor made in inference mode is not."""
    x = to_device(x.detach(), device)
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


def _shape(batch: Batch) -> tuple[int, int | None]:
    """Number of sequences and their length (None for inputs that are not token sequences)."""
    for key in ("input_ids", "inputs_embeds"):
        if isinstance(batch.get(key), Tensor):
            shape = batch[key].shape
            if len(shape) < 2 or shape[1] == 0:
                raise InvalidBatchError(
                    f"{key} has shape {tuple(shape)}, expected [N, T] with at least one token"
                )
            return shape[0], shape[1]
    tensors = [
        value
        for key, value in batch.items()
        if isinstance(value, Tensor) and value.dim() > 0 and key not in _NOT_FOR_THE_MODEL
    ]
    if not tensors:
        raise InvalidBatchError(
            f"a batch holds no input tensor; its keys are {sorted(map(str, batch))}: pass tensors, as tokenizers give "
            "them with return_tensors='pt'"
        )
    mask = batch.get("attention_mask")
    return tensors[0].shape[0], mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _checked_mask(mask: Any, n: int, length: int | None, checks: DeferredChecks) -> Tensor:
    if not isinstance(mask, Tensor):
        raise InvalidBatchError(f"attention_mask must be a tensor [N, T], got {type(mask).__name__}")
    if mask.dim() != 2 or mask.shape[0] != n or (length is not None and mask.shape[1] != length):
        raise InvalidBatchError(f"attention_mask has shape {tuple(mask.shape)}, expected {(n, length)}")
    real: Tensor = mask.bool()
    checks.require(
        ((mask == 0) | (mask == 1)).all(),
        "attention_mask has other values than 0 and 1 (numbers of packed examples, or what is added to scores): pass "
        "1 at real tokens and 0 at pads",
    )
    checks.require(
        real.any(1).all(),
        "attention_mask has an all-zero row, an example without a real token: leave that example out",
    )
    return real


def _checked_group(group: Any, n: int, grouped: bool) -> Tensor | None:
    """[S] on the CPU, or None where no example has more than one sequence."""
    if not grouped:
        if group is not None:
            raise InvalidBatchError(
                "a batch has 'group', but in this task each sequence is an example: leave it out"
            )
        return None
    if group is None:
        raise InvalidBatchError("a batch of this task needs 'group' [S], the example of each sequence")
    members: Tensor = torch.as_tensor(group).cpu()
    if members.shape != (n,) or members.is_floating_point() or members.min() < 0:
        raise InvalidBatchError(f"'group' must hold {n} indices of examples, got {tuple(members.shape)}")
    counts = torch.bincount(members.long())
    if not counts.all():
        raise InvalidBatchError(
            f"example {int(counts.argmin())} of a batch has no sequence in 'group': batches hold whole examples"
        )
    return members.long()
