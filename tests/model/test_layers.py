"""Which layers `layers="last"` selects, and which trained parameters no posterior covers."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from laplace_lora_fast import Classes, LaplaceLoRA
from laplace_lora_fast.model.heads import Head
from laplace_lora_fast.model.lora import trained_layers
from tests import tiny
from tests.model.taps import ANSWERS


def tiny_t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return tiny.adapt(transformers.T5ForConditionalGeneration(config), targets=("q", "v", "wo"))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(4, 2), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))


class MixtureOfExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(2))


def sequential(*after):
    blocks = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Sequential(nn.Linear(4, 4)))
    return nn.Sequential(blocks, *after)


MODELS = {
    "decoder": (
        lambda: tiny.tiny_llama(targets=("q_proj", "v_proj", "down_proj")),
        ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"],
        "layers.1.",
    ),
    "output head": (lambda: tiny.tiny_llama(targets=("q_proj", "lm_head")), ["lm_head"], "model."),
    "encoder-decoder": (
        tiny_t5,
        [
            "layer.0.SelfAttention.q",
            "layer.0.SelfAttention.v",
            "layer.1.EncDecAttention.q",
            "layer.1.EncDecAttention.v",
            "layer.2.DenseReluDense.wo",
        ],
        "decoder.block.1.",
    ),
    "experts": (
        lambda: tiny.adapt(MixtureOfExperts(), targets="all-linear"),
        ["router", "experts.0", "experts.1"],
        "layers.1.",
    ),
    "sequence": (lambda: tiny.adapt(sequential(), targets=r"0\.\d\.0"), ["0"], "0.1."),
    "sequence with a head": (
        lambda: tiny.adapt(sequential(nn.Linear(4, 2)), targets=r"1|0\.\d\.0"),
        ["1"],
        "model.",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_last(name):
    build, expected, stem = MODELS[name]
    model = build()
    layers = trained_layers(model, Head(model), "last")
    assert [layer.name.rpartition(stem)[2] for layer in layers] == expected


def test_biases_and_what_is_left_out_are_left_alone_and_named():
    model = tiny.tiny_llama_classifier(2, task_type="SEQ_CLS", lora_bias=True)
    la = LaplaceLoRA(model, Classes())
    left = {name.removeprefix("base_model.model.") for name in la.parameters_left_alone}
    biases = {
        f"model.layers.{i}.self_attn.{p}.lora_B.default.bias" for i in "01" for p in ("q_proj", "v_proj")
    }
    assert left == biases
    la = LaplaceLoRA(model, Classes(), layers=lambda name: "modules_to_save" not in name)
    left = {name.removeprefix("base_model.model.") for name in la.parameters_left_alone}
    assert left == biases | {"score.modules_to_save.default.weight"}
    la.fit([tiny.batch(4, classes=2)], progress=False)
    assert la.parameters_left_alone[0] in la.summary()
    assert LaplaceLoRA(tiny.tiny_llama(), ANSWERS).parameters_left_alone == []


def test_modules_to_save_are_named_for_a_model_loaded_for_inference():
    model = tiny.tiny_bert_classifier(2, task_type="SEQ_CLS")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert LaplaceLoRA(model, Classes()).parameters_left_alone == []
    la = LaplaceLoRA(model, Classes(), layers=lambda name: "modules_to_save" not in name)
    left = la.parameters_left_alone
    assert {name.rsplit(".", 1)[-1] for name in left} == {"weight", "bias"}
    assert all("classifier.modules_to_save.default" in name for name in left)
