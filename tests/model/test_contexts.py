"""Whatever a tap does to a model while it is inside is undone, and what the caller has set does not matter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace_lora_fast import Classes, LaplaceLoRA, UnsupportedAdapterError
from laplace_lora_fast.model.lora import lora_layers
from laplace_lora_fast.model.tap import Tap
from tests import tiny
from tests.model.taps import ANSWERS, Recorder, assert_same_gradients, read, tapped, tapped_gradients


def observed_state(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        {name: [len(getattr(module, hook)) for hook in hooks] for name, module in model.named_modules()},
        {
            name: list(getattr(module, "_forward_hooks_with_kwargs", ()))
            for name, module in model.named_modules()
        },
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


def mixed_mode_model(**lora):
    """Flags that no single train() or eval() call gives."""
    model = tiny.tiny_llama(targets=("q_proj", "lm_head"), **lora).train()
    model.get_base_model().model.layers[0].eval()
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


SOME_FROZEN = pytest.mark.filterwarnings("ignore:.*do not require gradients")


@SOME_FROZEN
def test_model_is_left_as_it_was():
    model = mixed_mode_model()
    before, weights = observed_state(model), {k: v.clone() for k, v in model.state_dict().items()}
    tapped_gradients(model, tiny.batch(2), ANSWERS)
    la = LaplaceLoRA(model, ANSWERS).fit([tiny.batch(2)], progress=False)
    la.predict(tiny.batch(2))
    la.predict(tiny.batch(2), link_approx="map")
    assert observed_state(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def fail(*args):
    raise RuntimeError("the model's own failure")


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        fail()


@SOME_FROZEN
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_model_is_left_as_it_was_after_an_error(where):
    model = mixed_mode_model()
    la = LaplaceLoRA(model, ANSWERS).fit([tiny.batch(2)], progress=False)
    before = observed_state(model)

    def hook(module, args, output):
        if where == "forward":
            fail()
        return Failing.apply(output)

    handle = model.get_base_model().model.layers[1].register_forward_hook(hook)
    for call in (lambda: la.fit([tiny.batch(2)], progress=False), lambda: la.predict(tiny.batch(2))):
        with pytest.raises(RuntimeError, match="own failure"):
            call()
    handle.remove()
    assert observed_state(model) == before
    assert_same_gradients(tiny.tiny_llama(), tiny.batch(2), ANSWERS)


def test_model_is_left_as_it_was_after_an_error_on_entering():
    model = mixed_mode_model()
    head = ANSWERS.head(model)
    layers = lora_layers(model, head)
    before = observed_state(model)
    layers[-1].module.merge()
    with (
        pytest.raises(UnsupportedAdapterError, match=r"lm_head.*merged"),
        Tap(model, head, layers, Recorder()),
    ):
        pass
    layers[-1].module.unmerge()
    assert observed_state(model) == before


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_observers_run_without_autograd_and_autocast(checkpointing):
    """Also in the backward pass, under the caller's autocast and within both kinds of checkpointing."""
    model, modes = tiny.tiny_llama(dtype=torch.float32), []

    class Probe:
        def observe_input(self, *args):
            modes.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

        observe_gradient = observe_input

    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    tap, head = tapped(model, ANSWERS, Probe())
    with torch.autocast("cpu", torch.bfloat16), tap:
        u = tap.forward(read(head, tiny.batch(4)))
        tap.backward(u, torch.ones_like(u), last=True)
    assert len(modes) == len(set(tap.shared_inputs)) + len(tap.layers)
    assert set(modes) == {(False, False)}


class Encoder(nn.Module):
    """A fused nn.TransformerEncoderLayer in evaluation mode would compute with the base weights alone."""

    def __init__(self, fail=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head, self.fail = nn.Linear(8, 3), fail

    def forward(self, x):
        if self.fail:
            fail()
        return self.head(self.encoder(x).mean(1))


@pytest.mark.parametrize("enabled", [True, False])
def test_fused_encoder_layers(enabled):
    torch.manual_seed(0)
    model = tiny.adapt(Encoder(), targets=("linear1", "linear2")).eval()
    batch = {"x": torch.randn(4, 5, 8).double()}
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        expected = model(**batch).detach()
        torch.backends.mha.set_fastpath_enabled(enabled)
        la = LaplaceLoRA(model, Classes()).fit([batch], progress=False)
        mean, _ = la.logit_distribution(batch)
        torch.testing.assert_close(mean, expected)
        torch.testing.assert_close(la.predict(batch, link_approx="map"), mean.softmax(-1))
        model.get_base_model().fail = True
        with pytest.raises(RuntimeError, match="own failure"):
            la.predict(batch)
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
