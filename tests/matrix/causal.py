"""Causal language models of transformers, tiny and random."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from laplace_lora_fast import Answers
from tests.matrix import models
from tests.matrix.architectures import (
    HEAD,
    NO_GRADIENT,
    NOT_FINITE,
    PADS,
    SIDES,
    UNUSED,
    Family,
    Kind,
    named,
)
from tests.matrix.cells import Cell

GROUP = "Causal language models"
_MLA = {"head_dim": 4}
_CROSS = Kind(
    refused=UNUSED, left_out=r"encoder_attn|encoder\.layers", shifted=True
)  # of a decoder without its encoder
_SELECTS = Kind(refused=NO_GRADIENT, left_out=r"indexer|compressor|\.experts|\.gate$")
_MAMBA = ("in_proj", "x_proj")  # PEFT refuses out_proj
KINDS = {
    **named(
        "apertus arcee aria_text bamba beam bert bert-generation biogpt bitnet camembert codegen cohere cohere2 ctrl"
        " cwm data2vec-text diffllama doge electra ernie ernie4_5 exaone exaone4 falcon flint gemma gemma3_text"
        " gemma4_text glm glm4 gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss gptj granite granitemoe"
        " granitemoehybrid granitemoeshared helium hunyuan_v1_dense internlm3 jais2 jetmoe lfm2 llama megatron-bert"
        " minicpm3 ministral mistral modernbert-decoder moshi nanochat nemotron olmo olmo2 olmo3 olmo_hybrid"
        " openai-gpt opt persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_5_text qwen3_5_moe_text recurrent_gemma rembert"
        " roberta roberta-prelayernorm roformer seed_oss smollm3 stablelm starcoder2 xlm xlm-roberta xlm-roberta-xl"
        " hyperclovax roc_bert",
        Kind(),
    ),
    **dict.fromkeys(["bloom", "mpt"], Kind(fp32=("left",))),
    **dict.fromkeys(["gemma2", "granite_swa", "granitemoe_swa", "vaultgemma"], Kind(fp32=("left", "right"))),
    **named(
        "afmoe cohere2_moe deepseek_v2 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe glm4_moe_lite hunyuan_v1_moe"
        " mellum minimax minimax_m2 mixtral olmoe qwen3_moe qwen3_next solar_open",
        Kind(),
    ),
    **named("bart blenderbot blenderbot-small marian mbart mvp pegasus plbart trocr whisper", _CROSS),
    **dict.fromkeys(["axk2", "dots3_note_text", "hy_v4"], _SELECTS),
    "deepseek_v3": Kind(_MLA),
    "axk1": Kind(_MLA),
    "youtu": Kind(_MLA),
    **dict.fromkeys(["deepseek_v32", "glm_moe_dsa"], _SELECTS),
    "gpt_neo": Kind({"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "gemma3n_text": Kind(
        {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0},
        sides={"left": NOT_FINITE},
    ),
    "lfm2_moe": Kind({"layer_types": ["conv", "full_attention"]}),
    "xmod": Kind({"languages": ["en"], "default_language": "en"}),
    "zaya": Kind({"num_experts_per_tok": 1}),
    "mamba": Kind(targets=_MAMBA),
    "falcon_mamba": Kind(targets=_MAMBA),
    "mamba2": Kind({"num_heads": 4, "head_dim": 8, "n_groups": 1}, targets=("in_proj",)),
    "falcon_h1": Kind(targets=("in_proj", "q_proj", "v_proj", "gate_proj", "down_proj")),
    "nemotron_h": Kind(targets=("in_proj", "q_proj", "v_proj", "up_proj", "down_proj")),
    "jamba": Kind(refused=UNUSED, left_out="dt_proj"),
    "llama4_text": Kind(targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj")),
    "phimoe": Kind(targets=("q_proj", "k_proj", "v_proj", "o_proj")),
    "big_bird": Kind(refused=NO_GRADIENT, left_out="pooler"),
    "rwkv": Kind(sides={"left": PADS}),
    "xlstm": Kind(sides={"left": PADS}),
    "xglm": Kind(fp32=tuple(SIDES)),
    # a prompt of its own stands before the tokens
    "cpmant": Kind({"dim_ff": 24, "dim_head": 8}, sides=dict.fromkeys(("left", "right"), PADS)),
    "prophetnet": Kind(refused=HEAD),
    "xlnet": Kind(),
}
QUICK = frozenset(
    {"llama", "gpt2", "bloom", "mamba", "mixtral", "gemma3_text", "qwen3", "phi3", "whisper", "rwkv"}
)
LEFT_TO_OTHERS = {
    "blt, fuyu, gemma3, gemma3n, gemma4, git, got_ocr2, llama4, mllama, phi4_multimodal, qwen3_5, emu3": (
        "several models in one, whose parts have configurations of their own: see the models with images"
    ),
    "dbrx, cohere_compass_text": "their configurations cannot be built from arguments in this version of transformers",
    "bailing_hybrid, kimi_linear, longcat_flash, mimo_v2_flash, inkling_text, inkling2_text, zamba, zamba2": (
        "their sizes depend on each other: no small model was made"
    ),
    "reformer": "takes sequences of one length only in training",
    "musicgen, musicgen_melody, moss_transcribe_diarize": "give several tokens at once, no answer",
}


def base(kind: str, **own: Any) -> Any:
    """A tiny model of a kind."""
    name = NAMES[kind]
    torch.manual_seed(0)
    return getattr(transformers, name if isinstance(name, str) else name[0])(models.config(kind, **own))


def cells() -> list[Cell]:
    """All of them."""
    return Family(GROUP, KINDS, base, Answers(models.ANSWERS), QUICK, usual="left").cells()
