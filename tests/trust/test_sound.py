"""Audio encoders that drop layers in training mode, with gradient checkpointing as a trainer leaves it."""

from __future__ import annotations

import pytest
import torch
import transformers

from laplace_lora_fast import Classes
from tests.matrix import models, multimodal, oracle

TARGETS = {"Wav2Vec2": ["q_proj", "v_proj"], "Hubert": ["q_proj", "v_proj"]}
TARGETS |= {"WavLM": ["intermediate_dense", "output_dense"]}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", TARGETS)
def test_no_layer_is_dropped(kind, checkpointing):
    torch.manual_seed(0)
    base = getattr(transformers, f"{kind}ForSequenceClassification")
    config = getattr(transformers, f"{kind}Config")(**multimodal.AUDIO)
    assert config.layerdrop == 0.5
    model = models.adapted(base(config), TARGETS[kind])
    generator = torch.Generator().manual_seed(1)
    sound = torch.randn(6, 320, generator=generator, dtype=torch.float64)
    rows = [{"input_values": row[None]} for row in sound]
    mean, covariance = oracle.posterior(model, models.classes_of, rows[:4], rows[4:])
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    la = models.fitted(model, Classes(), {"input_values": sound[:4]}, models.labels())
    first, again = (la.logit_distribution({"input_values": sound[4:]}) for _ in range(2))
    assert oracle.error(first[0], mean) < 1e-9
    assert oracle.error(first[1], covariance) < 1e-9
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
