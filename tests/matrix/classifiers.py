"""Sequence classifiers of transformers, tiny and random; every sequence ends with the token that some ask for."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

from laplace_lora_fast import Classes
from tests.matrix import models
from tests.matrix.architectures import (
    NO_GRADIENT,
    NOT_FINITE,
    PADS,
    SLOPES,
    UNUSED,
    Family,
    Kind,
    named,
)
from tests.matrix.cells import Cell

EOS = 2
_POOLS = Kind(sides={"left": PADS})  # the first position, a pad if pads are on the left
_MIXES = Kind(sides={"left": PADS, "right": PADS})  # tokens and pads, whatever the mask says
KINDS = {
    **named(
        "arcee diffllama doge eurobert exaone4 falcon gemma gemma3_text glm glm4 gpt_neox gpt_oss gptj"
        " helium hunyuan_v1_dense jetmoe llama minicpm3 ministral mistral modernbert-decoder nemotron"
        " olmo olmo2 olmo3 opt persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_5_text seed_oss smollm3"
        " stablelm starcoder2",
        Kind(),
    ),
    **named(
        "albert bart bert bigbird_pegasus camembert data2vec-text deberta deberta-v2 distilbert electra ernie esmc gte"
        " jina_embeddings_v3 layoutlm mbart megatron-bert modernbert mpnet mt5 mvp nomic_bert plbart rembert roberta"
        " roberta-prelayernorm roformer tapas ultrabert umt5 xlm-roberta xlm-roberta-xl",
        _POOLS,
    ),
    **named(
        "biogpt ctrl flaubert gpt-sw3 gpt2 gpt_bigcode mobilebert openai-gpt squeezebert xlm",
        Kind(shifted=True),
    ),
    **dict.fromkeys(["convbert", "fnet", "nystromformer"], _MIXES),
    # the backward pass of its attention is an estimate, and pads are mixed in
    "yoso": Kind(refused=SLOPES),
    **named("deepseek_v2 hunyuan_v1_moe minimax mixtral qwen3_moe qwen3_next", Kind()),
    **dict.fromkeys(["bloom", "mpt"], Kind(sides={"left": NOT_FINITE})),
    "gemma2": Kind(sides={"left": NOT_FINITE, "right": NOT_FINITE}),
    "big_bird": Kind(refused=NO_GRADIENT, left_out="pooler", sides={"left": PADS}),
    "esm": Kind(refused=UNUSED, left_out="contact_head", sides={"left": PADS}),
    "markuplm": Kind(refused=UNUSED, left_out="xpath", sides={"left": PADS}),
    "jamba": Kind(refused=UNUSED, left_out="dt_proj"),
    "axk2": Kind(refused=NO_GRADIENT, left_out=r"indexer|\.experts|\.gate$"),
    # two blocks: transformers' third fails on three tokens
    "funnel": Kind({"block_sizes": [1, 1], "d_head": 8, "d_inner": 24}, sides={"left": PADS}),
    "longformer": Kind(sides={"left": NOT_FINITE}),
    "xlnet": Kind(sides={"right": PADS}),
}
QUICK = frozenset(
    {"llama", "bert", "deberta-v2", "albert", "modernbert", "t5", "fnet", "bart", "distilbert", "yoso"}
)


def base(kind: str, **own: Any) -> Any:
    """A tiny model of a kind."""
    name = NAMES[kind]
    torch.manual_seed(0)
    config = models.config(kind, num_labels=3, is_decoder=False, **own)
    return getattr(transformers, name if isinstance(name, str) else name[0])(config)


def cells() -> list[Cell]:
    """All of them."""
    return Family(
        "Sequence classifiers", KINDS, base, Classes(), QUICK, usual="right", last_token=EOS
    ).cells()
