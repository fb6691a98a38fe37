"""Tiny, seeded models of transformers with a LoRA adapter, batches for them, and the comparison with the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from laplace_lora_fast import Answers, LaplaceLoRA, Rows
from laplace_lora_fast.tasks import Task
from tests.matrix import oracle

transformers.logging.set_verbosity_error()

VOCAB = 48
ANSWERS = (5, 11, 7)
EXACT = Rows(columns=1 << 20)  # a sketch of all columns: no approximation
TRAIN, TEST = 4, 2
LENGTHS = (7, 4, 6, 3, 5, 7)  # of TRAIN + TEST sequences

# What makes a configuration small, whatever its architecture calls it.
_SIZES = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "use_cache": False,
    "expansion_ratio": 2,
    "mamba_expand": 2,
    "n_group": 1,
    "topk_group": 1,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "encoder_layers": 1,
    "num_labels": 3,
}
_SIZES |= dict.fromkeys(("initializer_range", "init_std"), 0.3)
_SIZES |= dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2)
_SIZES |= dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads"), 2)
_SIZES |= dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 2)
_SIZES |= dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "num_global_key_value_heads"), 2)
_SIZES |= dict.fromkeys(("num_experts_per_tok", "num_codebooks", "time_step_rank", "mamba_dt_rank"), 2)
_SIZES |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "sliding_window"), 4)
_SIZES |= dict.fromkeys(("rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim", "laurel_rank"), 4)
_SIZES |= dict.fromkeys(("state_size", "conv_kernel", "mamba_d_state", "mamba_d_conv", "mamba_num_heads"), 4)
_SIZES |= dict.fromkeys(("mamba_n_heads", "hidden_size_per_layer_input"), 4)
_SIZES |= dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_head_dim", "kv_lora_rank", "q_lora_rank"), 8)
_SIZES |= dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8)
_SIZES |= dict.fromkeys(("global_head_dim", "moe_intermediate_size"), 8)
_SIZES |= dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 8)
_SIZES |= dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "attention_hidden_size"), 16)
_SIZES |= dict.fromkeys(("emb_dim", "block_dim", "lru_width", "dim"), 16)
_SIZES |= dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "dff", "hidden_dim"), 24)
_SIZES |= dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 24)
_SIZES |= {"mamba_d_ssm": 32, "vocab_size_per_layer_input": VOCAB}
_SIZES |= dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64)


def config(kind: str, **own: Any) -> Any:
    """The configuration `kind` of transformers with all sizes made small, and what is its `own`."""
    cls = CONFIG_MAPPING[kind]
    known = set(cls().to_dict())
    made = cls(**{key: value for key, value in _SIZES.items() if key in known} | own)
    made._experts_implementation = "eager"  # grouped kernels know no fp64
    return made


def adapted(
    base: nn.Module,
    targets: Any = "all-linear",
    dtype: torch.dtype = torch.float64,
    seed: int = 7,
    **lora: Any,
) -> peft.PeftModel:
    """LoRA with a random B on a base model, in evaluation mode."""
    targets = targets if isinstance(targets, str) else list(targets)
    settings = {"r": 3, "lora_alpha": 6, "target_modules": targets} | lora
    model = peft.get_peft_model(base.to(dtype), peft.LoraConfig(**settings), autocast_adapter_dtype=False)
    return randomised(model, seed).eval()


def randomised(model: nn.Module, seed: int = 7) -> Any:
    """Draws every lora_B, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and "bias" not in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(0.3 * noise)
    return model


def sequences(
    low: int = 3, high: int = VOCAB, lengths: Sequence[int] = LENGTHS, seed: int = 1
) -> list[Tensor]:
    """TRAIN + TEST sequences of token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(low, high, (length,), generator=generator) for length in lengths]


def labels(classes: int = 3) -> Tensor:
    """Of the TRAIN sequences."""
    return torch.arange(TRAIN) % classes


def padded(tokens: Sequence[Tensor], side: str, pad: int = 0) -> dict[str, Tensor]:
    """A batch of sequences; without a `side` they are as long as each other, and there is no mask."""
    if side == "none":
        return {"input_ids": torch.stack(list(tokens))}
    width = max(map(len, tokens))
    ids = torch.full((len(tokens), width), pad)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(tokens):
        place = slice(width - len(sequence), None) if side == "left" else slice(len(sequence))
        ids[row, place], mask[row, place] = sequence, 1
    return {"input_ids": ids, "attention_mask": mask}


def rows_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Batches of one row each."""
    return [{key: value[n : n + 1] for key, value in batch.items()} for n in range(len(batch["input_ids"]))]


def answers_of(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    """Logits of the answers at a row's last real token."""
    mask = row.get("attention_mask")
    last = -1 if mask is None else int(mask[0].nonzero().max())
    return model(**row).logits[0, last, list(ANSWERS)]


def classes_of(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    """A classifier's logits."""
    return model(**row).logits[0]


def fitted(
    model: nn.Module, task: Task, batch: dict[str, Tensor], targets: Tensor, **options: Any
) -> LaplaceLoRA:
    """Fits the exact posterior on a batch."""
    options = {"structure": EXACT} | options
    return LaplaceLoRA(model, task, **options).fit([{**batch, "labels": targets}], progress=False)


def compared(
    model: nn.Module,
    task: Task,
    train: dict[str, Tensor],
    test: dict[str, Tensor],
    expected: tuple[Tensor, Tensor],
    around: Callable[[], Any] | None = None,
    **options: Any,
) -> float:
    """The larger error of mean and covariance."""
    la = fitted(model, task, train, labels(), **options)
    mean, covariance = la.logit_distribution(test)
    return max(oracle.error(mean, expected[0]), oracle.error(covariance, expected[1]))


def text_error(
    model: nn.Module, task: Task, tokens: Sequence[Tensor], side: str, shifted: bool = False, **options: Any
) -> float:
    """Error of a posterior from padded batches, against sequences alone and without pads.

    `shifted`: pads move the positions that the model counts, so that it gives other logits. The posterior is then that
    of what the model computes: the oracle runs on the same padded rows, one at a time.
    """
    outputs = answers_of if isinstance(task, Answers) else classes_of
    weights = oracle.lora_weights(model, options.get("layers") or (lambda name: True))
    train, test = padded(tokens[:TRAIN], side), padded(tokens[TRAIN:], side)
    rows = [*rows_of(train), *rows_of(test)] if shifted else [{"input_ids": ids[None]} for ids in tokens]
    expected = oracle.posterior(model, outputs, rows[:TRAIN], rows[TRAIN:], weights)
    return compared(model, task, train, test, expected, **options)
