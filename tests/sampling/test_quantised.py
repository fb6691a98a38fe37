"""Samples on quantised linear layers, whose kernels have no forward-mode derivative."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from laplace_lora_fast import Answers, LaplaceLoRA, Rows
from tests import tiny
from tests.oracle import assert_close


class _Kernel(torch.autograd.Function):
    """x W^T with a backward pass alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.contiguous().view(-1, x.shape[-1]).matmul(weight.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g @ ctx.saved_tensors[0], None


class Packed(nn.Module):
    """A linear layer of codes in 8 bits and a scale."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = float(layer.weight.abs().max()) / 127
        self.register_buffer("weight", (layer.weight / self.scale).round().to(torch.int8))
        self.bias = nn.Parameter(torch.linspace(-1, 1, layer.out_features, dtype=layer.weight.dtype))

    @property
    def matrix(self) -> Tensor:
        return self.weight.to(self.bias) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return _Kernel.apply(x, self.matrix) + self.bias


def pair() -> tuple[nn.Module, nn.Module]:
    """A model with packed layers where there is no adapter, and one with the matrices that they stand for."""
    packed, plain = tiny.tiny_llama(), tiny.tiny_llama()
    for one, other in zip(packed.modules(), plain.modules(), strict=True):
        if hasattr(one, "gate_proj"):
            for name in ("gate_proj", "down_proj"):
                layer = Packed(getattr(one, name))
                setattr(one, name, layer)
                linear = nn.Linear(layer.in_features, layer.out_features).double()
                linear.weight.data, linear.bias.data = layer.matrix, layer.bias.data
                setattr(other, name, linear)
    return packed, plain


def test_they_are_those_of_the_weights_that_the_layers_stand_for() -> None:
    samples, batch = [], tiny.batch(3, length=6, labels=False)
    for model in pair():
        la = LaplaceLoRA(model, Answers(tiny.ANSWERS), structure=Rows(), prior_precision=2.0)
        samples.append(la.fit([tiny.batch(6, length=6)], progress=False).sample(3))
    forwards = [vars(module).get("forward") for module in samples[0]._subject.model.modules()]
    assert_close(samples[0].outputs(batch), samples[1].outputs(batch), 1e-10)
    assert samples[0]._subject.head.forward_mode_is_exact
    assert forwards == [vars(module).get("forward") for module in samples[0]._subject.model.modules()]


def test_texts_are_generated_and_scored() -> None:
    prompts, found = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}, []
    for model in pair():
        la = LaplaceLoRA(model, Answers(tiny.ANSWERS), structure=Rows(), prior_precision=20.0)
        la.fit([tiny.batch(6, length=6)], progress=False)
        found.append((la.generate(prompts, n_samples=2, max_new_tokens=3), la.token_uncertainty(prompts)))
    (packed, scores), (plain, expected) = found
    assert torch.equal(packed.tokens, plain.tokens)
    assert_close(packed.uncertainty.total, plain.uncertainty.total, 1e-9)
    assert_close(scores.log_probs[:, :, 1:], expected.log_probs[:, :, 1:], 1e-9)


@pytest.mark.filterwarnings("ignore:.*outputs change in steps")
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_layers_of_bitsandbytes(bits: int, prepared: bool) -> None:
    """Against the model with the sampled weights, where it is linear; 8 bits are those of inputs too: only proved."""
    pytest.importorskip("bitsandbytes")
    from tests.matrix import models, quantisers

    base = quantisers.bitsandbytes(**(quantisers.NF4 if bits == 4 else {"load_in_8bit": True}))
    base = peft.prepare_model_for_kbit_training(base) if prepared else base
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    model = models.randomised(peft.get_peft_model(base, config)).eval()
    batch = models.padded(models.sequences(), "left")
    la = models.fitted(model, Answers(models.ANSWERS), batch, torch.arange(6) % 3)
    samples = la.sample(2, prior_precision=1e7)
    if bits == 8:  # its steps are larger than what samples change
        assert samples.outputs(batch).isfinite().all()
        assert la._head.forward_mode_is_exact
        return
    plain = samples.still(samples).outputs(batch, linearised=False)
    moved = samples.outputs(batch, linearised=False) - plain
    assert_close(samples.outputs(batch) - plain, moved, 2e-2)
