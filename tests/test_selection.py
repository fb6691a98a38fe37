"""Which layers `layers="last"` selects; names and predicates are in test_structures.py."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from laplace_lora_fast import LaplaceLoRA
from tests import tiny


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
    sites = LaplaceLoRA(build(), layers="last").sites
    assert [site.name.rpartition(stem)[2] for site in sites] == expected
