"""The model in question: a base with a head for the answers alone, and an adapter; tokens of prompts; batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.protocols.config import Lora, Prompt
from bench.protocols.records import Question, text_of
from laplace_lora_fast import Answers, LaplaceWarning
from laplace_lora_fast.data.groups import option_examples
from laplace_lora_fast.data.prompts import batches_from_ids
from laplace_lora_fast.devices import to_device
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError
from laplace_lora_fast.model.batches import Batch, Inputs
from laplace_lora_fast.model.heads import Head
from laplace_lora_fast.model.heads.causal import AnswerHead
from laplace_lora_fast.options import register

_NEVER = -1e4  # the logit of an answer that a question does not have: its probability is 0


class _SomeAnswersHead(AnswerHead):
    """Answers of which every question has the first few: a batch has "choices" [N], how many."""

    own_keys = ("choices",)

    def inputs(self, batch: Batch, device: torch.device, checks: DeferredChecks) -> Inputs:
        inputs = super().inputs(batch, device, checks)
        if inputs.own["choices"].shape != (inputs.n_sequences,):
            raise InvalidBatchError(f"'choices' must hold {inputs.n_sequences} numbers")
        return replace(inputs, own={"choices": to_device(inputs.own["choices"], device)})

    def read(self, output: Any, inputs: Inputs) -> Tensor:
        logits = super().read(output, inputs)
        place = torch.arange(logits.shape[1], device=logits.device)
        count = inputs.own["choices"].to(logits.device)
        return logits.masked_fill(place >= count[:, None], _NEVER)


@register
@dataclass(frozen=True)
class SomeAnswers(Answers):
    """`Answers` of which a question has the first few."""

    def head(self, model: nn.Module) -> Head:
        return _SomeAnswersHead(model, self.spellings)


@dataclass(frozen=True)
class Encoded:
    """A prompt's tokens, its label, how many answers it has, and what its rows may be ordered by."""

    ids: list[int]
    label: int
    choices: int
    fields: dict[str, Any]


def encoded(
    tokenizer: Any, questions: Sequence[Question], prompt: Prompt, text: str | None = None
) -> list[Encoded]:
    """Tokens of prompts, cut from the right.

    Warns:
        LaplaceWarning: prompts lost tokens; says how many did.

    Raises:
        ValueError: the prompt is to end in a token that the tokenizer has not.
    """
    end = [tokenizer.eos_token_id] if prompt.end_token else []
    if None in end:
        raise ValueError("prompt.end_token: the tokenizer has no eos_token")
    found, cut = [], 0
    for question in questions:
        ids = list(tokenizer(text_of(question, prompt, text))["input_ids"])
        kept = ids[: prompt.max_length - len(end)]
        cut += len(kept) < len(ids)
        found.append(Encoded(kept + end, question.label, len(question.choices), question.fields))
    if cut:
        warnings.warn(
            f"{cut} of {len(found)} prompts were cut to {prompt.max_length} tokens",
            LaplaceWarning,
            stacklevel=2,
        )
    return found


def answer_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The token of each answer.

    Raises:
        ValueError: an answer has several tokens.
    """
    ((_, options, _),) = option_examples(tokenizer, [{"prompt": "Answer:", "choices": prompt.answers}])
    if not prompt.space:
        options = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in prompt.answers]
    for answer, tokens in zip(prompt.answers, options, strict=True):
        if len(tokens) > 1:
            raise ValueError(f"answer {answer!r} has {len(tokens)} tokens with this tokenizer")
    return [tokens[0] for tokens in options]


def batched(
    rows: Sequence[Encoded], size: int, task: Answers, in_order: bool = False
) -> list[dict[str, Tensor]]:
    """Batches, padded on the left: of like length together, or in the order of the rows."""
    rows = rows if in_order else sorted(rows, key=lambda row: len(row.ids))
    batches = []
    for start in range(0, len(rows), size):
        some = sorted(
            rows[start : start + size], key=lambda row: len(row.ids)
        )  # as `batches_from_ids` has them
        (batch,) = batches_from_ids([(row.ids, row.label) for row in some], size)
        if isinstance(task, SomeAnswers):
            batch["choices"] = torch.tensor([row.choices for row in some])
        batches.append(batch)
    return batches


def task_of(rows: Sequence[Encoded], answers: int) -> Answers:
    """`Answers`, or `SomeAnswers` where not every question has all of them."""
    kind = Answers if all(row.choices == answers for row in rows) else SomeAnswers
    return kind(range(answers))


def with_answers_alone(model: Any, token_ids: Sequence[int]) -> Any:
    """Replaces the output head by its rows of the answers: no other logit is looked at, trained or tested."""
    head = model.get_output_embeddings()
    weight = head.weight.detach()[list(token_ids)].clone()
    small = nn.Linear(weight.shape[1], len(token_ids), bias=head.bias is not None).to(weight)
    with torch.no_grad():
        small.weight.copy_(weight)
        if head.bias is not None:
            small.bias.copy_(head.bias[list(token_ids)])
    model.set_output_embeddings(small.requires_grad_(False))
    model.config.tie_word_embeddings = False
    return model


def adapted(model: Any, lora: Lora, seed: int) -> Any:
    """An untrained adapter, seeded."""
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapter's weights by name."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def load(source: str, device: str, dtype: str, quantise: int, device_map: str | None) -> tuple[Any, Any]:
    """A base model and its tokenizer.

    Args:
        source: a folder or a hub name.
        device: where it goes without a `device_map`.
        dtype: of its weights.
        quantise: bits, 4 or 8; 0 for none. Needs bitsandbytes.
        device_map: such as "auto", over all devices.
    """
    import transformers

    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if quantise:
        kinds = {
            4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16},
            8: {"load_in_8bit": True},
        }
        options["quantization_config"] = transformers.BitsAndBytesConfig(**kinds[quantise])
    if device_map or quantise:
        options["device_map"] = device_map or {"": device}
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, **options)
    return (model if "device_map" in options else model.to(device)).eval(), tokenizer
