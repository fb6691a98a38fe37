"""Encoders whose layers do unusual things, each in a padded batch and one sequence at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from laplace_lora_fast import Classes, LaplaceError, LaplaceLoRA
from tests.matrix import models, oracle

EOS = 2
SMALL = {"num_labels": 3, "is_decoder": False}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8}
ZOO: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "DebertaV2": (
        "deberta-v2",
        {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "max_relative_positions": 8,
            "position_buckets": 4,
        },
        ["query_proj", "key_proj", "value_proj"],
    ),
    "Deberta": (
        "deberta",
        RELATIVE,
        ["in_proj"],
    ),
    "ModernBert": ("modernbert", {}, ["Wqkv", "Wo"]),
    "ModernBert, mean": ("modernbert", {"classifier_pooling": "mean"}, ["Wqkv", "Wo"]),
    "Albert": ("albert", {"embedding_size": 8}, ["query", "value"]),
    "Albert, classifier": ("albert", {"embedding_size": 8}, ["classifier", "pooler"]),
    "FNet": ("fnet", {}, ["intermediate.dense"]),
    "Esm": (
        "esm",
        {"mask_token_id": 4, "position_embedding_type": "rotary", "token_dropout": True},
        ["query", "value"],
    ),
    "MPNet": ("mpnet", {}, ["attn.q", "attn.v"]),
    "MobileBert": (
        "mobilebert",
        {"intermediate_size": 16, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
        ["query", "value"],
    ),
    "DistilBert": ("distilbert", {}, ["q_lin", "v_lin", "pre_classifier"]),
    "Roberta": ("roberta", {}, ["query", "value", "classifier.dense"]),
    "Electra": ("electra", {"embedding_size": 8}, ["query", "embeddings_project"]),
    "Nystromformer": ("nystromformer", {}, ["query", "value"]),
    "Bart": ("bart", {"decoder_start_token_id": EOS}, ["q_proj", "v_proj"]),
    "T5": ("mt5", {"decoder_start_token_id": 0}, ["q", "v"]),
    "XLNet": ("xlnet", {}, ["layer_1", "layer_2"]),
    "Funnel": ("funnel", {"block_sizes": [1, 1], "d_head": 8, "d_inner": 24}, ["q_head", "v_head"]),
    "Longformer": ("longformer", {"attention_window": 4}, ["query", "value"]),
}
# What cannot be exact in a batch with pads on the right: there they mix with tokens.
REFUSED_PADDED = {"FNet", "Nystromformer", "XLNet"}


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "one by one"])
@pytest.mark.parametrize("name", ZOO)
def test_right_or_refused(name, padded):
    kind, own, targets = ZOO[name]
    names = transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    torch.manual_seed(0)
    config = models.config(kind, **SMALL, **own)
    model = models.adapted(getattr(transformers, names[kind])(config), targets)
    tokens = [torch.cat([ids[:-1], torch.tensor([EOS])]) for ids in models.sequences(low=5)]
    alone = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in tokens]
    train, test = (
        ([models.padded(tokens[:4], "right")], [models.padded(tokens[4:], "right")])
        if padded
        else (alone[:4], alone[4:])
    )
    targets_of = models.labels().split([len(batch["input_ids"]) for batch in train])
    train = [{**batch, "labels": labels} for batch, labels in zip(train, targets_of, strict=True)]
    la = LaplaceLoRA(model, Classes(), structure=models.EXACT)
    if padded and name in REFUSED_PADDED:
        with pytest.raises(LaplaceError, match="padded positions"):
            la.fit(train, progress=False)
        return
    mean, covariance = oracle.posterior(model, models.classes_of, alone[:4], alone[4:])
    parts = [la.fit(train, progress=False).logit_distribution(batch) for batch in test]
    assert oracle.error(torch.cat([part[0] for part in parts]), mean) < oracle.FP64
    assert oracle.error(torch.cat([part[1] for part in parts]), covariance) < oracle.FP64
