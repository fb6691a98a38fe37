"""What is hung on a model, before and after its fit: hooks, forwards, tensors; randomness that rarely has an effect."""

from __future__ import annotations

import random
from functools import partial
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn

from laplace_lora_fast import (
    Answers,
    Classes,
    InvalidBatchError,
    LaplaceLoRA,
    NotFittedError,
    Outputs,
    Rows,
    UnsupportedAdapterError,
)
from tests import tiny

ANSWERS = Answers(tiny.ANSWERS)
TRAIN, TEST = tiny.split(tiny.batch(6, seed=1), 3), tiny.batch(3, seed=2)


def part(model, suffix):
    return next(module for name, module in model.named_modules() if name.endswith(suffix))


def fitted(model, train=TRAIN, task=ANSWERS):
    return LaplaceLoRA(model, task, structure=Rows(columns=1 << 20)).fit(train, progress=False)


# After a fit


def hook(suffix, function):
    return lambda model: part(model, suffix).register_forward_hook(lambda module, args, out: function(out))


def doubled_mlp(model):
    mlp = part(model, "layers.1.mlp")
    former = mlp.forward
    mlp.forward = lambda x: 2 * former(x)


def doubled_class(model, monkeypatch):
    kind = type(part(model, "layers.1.mlp"))
    former = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * former(self, x))


def other_attention(model):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    former = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["doubled"] = lambda *args, **kwargs: (2 * former(*args, **kwargs)[0], None)
    model.get_base_model().config._attn_implementation = "doubled"


CHANGES = {
    "lora_A": hook("q_proj.lora_A.default", lambda out: 2 * out),
    "layer": hook("q_proj", lambda out: 2 * out),
    "block": hook("layers.1.mlp", lambda out: 2 * out),
    "pre-hook": lambda model: part(model, "layers.1.mlp").register_forward_pre_hook(
        lambda module, args: (2 * args[0],)
    ),
    "forward": doubled_mlp,
    "attention": other_attention,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_that_computes_something_else_since_the_fit_is_refused(change):
    model = tiny.tiny_llama()
    la = fitted(model)
    change(model)
    for _ in range(2):  # not only the first time
        with pytest.raises(NotFittedError, match="computes something else"):
            la.predict(TEST)
    if change is not CHANGES["lora_A"]:  # refused, as it is not lora_A then
        assert torch.isfinite(la.fit(TRAIN, progress=False).predict(TEST)).all()


def test_a_hook_that_is_gone_since_the_fit_is_noticed():
    model = tiny.tiny_llama()
    handle = hook("layers.1.mlp", lambda out: 2 * out)(model)
    la = fitted(model)
    la.predict(TEST)
    handle.remove()
    with pytest.raises(NotFittedError, match="computes something else"):
        la.predict(TEST)


def test_a_class_whose_forward_is_replaced_since_the_fit_is_noticed(monkeypatch):
    model = tiny.tiny_llama()
    la = fitted(model)
    doubled_class(model, monkeypatch)
    with pytest.raises(NotFittedError, match="computes something else"):
        la.predict(TEST)


HELD = {
    "tensor": (torch.tensor(2.0, dtype=torch.float64), lambda mlp: mlp.held.mul_(2), lambda held: held),
    "list": ([1.0, 2.0], lambda mlp: mlp.held.__setitem__(1, 3.0), lambda held: held[1]),
    "dict": ({"scale": 2.0}, lambda mlp: mlp.held.update(scale=3.0), lambda held: held["scale"]),
    "object": (
        SimpleNamespace(scale=2.0),
        lambda mlp: setattr(mlp.held, "scale", 3.0),
        lambda held: held.scale,
    ),
    "function": (
        partial(torch.tensor, 2.0),
        lambda mlp: setattr(mlp, "held", partial(torch.tensor, 3.0)),
        lambda held: held().double(),
    ),
}


@pytest.mark.parametrize("kind", HELD)
def test_what_a_module_holds_and_computes_with(kind):
    model = tiny.tiny_llama()
    mlp = part(model, "layers.1.mlp")
    held, change, scale = HELD[kind]
    former, mlp.held = mlp.forward, held
    mlp.forward = lambda x: scale(mlp.held) * former(x)
    la = fitted(model)
    la.predict(TEST)
    change(mlp)
    with pytest.raises(NotFittedError, match="computes something else"):
        la.predict(TEST)


def test_what_only_looks_on_changes_nothing():
    model = tiny.tiny_llama()
    la = fitted(model)
    before = la.predict(TEST)
    for module in model.modules():
        module.register_forward_hook(lambda module, args, out: setattr(module, "seen", out))
        module.register_forward_pre_hook(lambda module, args: None)
    for _ in range(3):
        assert torch.equal(la.predict(TEST), before)
    model.set_adapter("default")
    assert torch.equal(la.predict(TEST), before)


def test_after_loading(tmp_path):
    model = tiny.tiny_llama()
    fitted(model).save(tmp_path)
    la = LaplaceLoRA.load(tmp_path, model)
    la.predict(TEST)
    doubled_mlp(model)
    with pytest.raises(NotFittedError, match="computes something else"):
        la.predict(TEST)


# Hooks on gradients


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("suffix", ["layers.1.mlp", "v_proj"])
def test_hooks_on_gradients_are_called_in_the_proof_of_gradients_alone(suffix, pre):
    model, calls = tiny.tiny_llama(), []
    expected = fitted(model).logit_distribution(TEST)
    kind = "register_full_backward_pre_hook" if pre else "register_full_backward_hook"
    module = part(model, suffix)
    handle = getattr(module, kind)(lambda module, *grads: calls.append(module))
    la = fitted(model)
    assert len(calls) == 1
    found = la.logit_distribution(TEST)
    assert len(calls) == 1
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-12, atol=0)
    model(**TEST | {"labels": TEST["input_ids"]}).loss.backward()
    assert len(calls) > 1  # the user's own pass
    handle.remove()
    assert not module._backward_hooks
    assert not module._backward_pre_hooks


@pytest.mark.parametrize("suffix", ["lora_dropout.default", "act_fn", "input_layernorm", "q_proj"])
def test_hooks_that_detach_are_refused_wherever_they_are(suffix):
    model = tiny.tiny_llama(targets=("q_proj", "v_proj", "down_proj"))
    later = part(model, "layers.1")
    part(later, suffix).register_forward_hook(lambda module, args, out: out.detach())
    with pytest.raises(UnsupportedAdapterError, match=f"{suffix.split('.')[0]}.* lets no gradient through"):
        fitted(model)


def test_a_hook_that_changes_a_later_batch_is_refused_there():
    model, calls = tiny.tiny_llama(), []

    def later(module, args, out):
        calls.append(module)
        return 2 * out if len(calls) > 4 else out

    part(model, "q_proj.lora_A.default").register_forward_hook(later)
    with pytest.raises(UnsupportedAdapterError, match=r"lora_A gives|two forward passes"):
        fitted(model, tiny.split(tiny.batch(12, seed=1), 2))


# Randomness, and batches


class Classifier(nn.Module):
    """Two layers with something of the user's between them."""

    def __init__(self, between):
        super().__init__()
        self.embedding, self.first, self.second = nn.Embedding(48, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.between = between

    def forward(self, input_ids):
        hidden = self.first(self.embedding(input_ids)).tanh()
        return SimpleNamespace(logits=self.second(self.between(hidden)).mean(1))


def classifier(between):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["first", "second"])
    model = peft.get_peft_model(Classifier(between).double(), config)
    tiny.randomise(model, 1)
    return model.double()


def of_one(n=3, times=30):
    return tiny.split(tiny.batch(n, 5, padding=None), 1) * times


@pytest.mark.parametrize("draw", [random.random, lambda: float(torch.rand(()))], ids=["Python's", "torch's"])
def test_randomness_that_rarely_has_an_effect(draw):
    random.seed(0)
    model = classifier(lambda hidden: 0 * hidden if draw() < 0.05 else hidden)
    with pytest.raises(UnsupportedAdapterError, match="two forward passes"):
        fitted(model, of_one(), Classes())


def test_draws_without_effect_are_no_fault():
    plain = fitted(classifier(lambda hidden: hidden), of_one(times=2), Classes())
    drawing = fitted(classifier(lambda hidden: (torch.rand(()), hidden)[1]), of_one(times=2), Classes())
    batch = {"input_ids": TEST["input_ids"]}
    torch.testing.assert_close(drawing.predict(batch), plain.predict(batch), rtol=1e-12, atol=0)


def the_smallest(hidden):
    sizes = hidden.detach().norm(dim=(1, 2))
    return hidden * (sizes == sizes.min()).to(hidden)[:, None, None]


MIXED = {
    "mean": lambda hidden: hidden - hidden.detach().mean(0, keepdim=True),
    "scale": lambda hidden: hidden / hidden.detach().abs().max() ** 8,
    "capacity": the_smallest,
}


@pytest.mark.parametrize("kind", MIXED)
def test_batches_that_mix_without_a_gradient_are_refused(kind):
    model = classifier(MIXED[kind])
    batch = tiny.batch(5, 5, padding=None)
    with pytest.raises(UnsupportedAdapterError, match="depend on other sequences"):
        fitted(model, [batch], Classes())
    if kind == "capacity":
        fitted(model, tiny.split(batch, 1), Classes())
        return
    with pytest.raises(UnsupportedAdapterError, match=r"gradients behind layer .*first' are not those"):
        fitted(model, tiny.split(batch, 1), Classes())  # a statistic of the sequence's own, detached


def test_a_loader_that_puts_the_model_into_training_mode():
    model = tiny.tiny_gpt2()  # with dropout
    expected = fitted(model).logit_distribution(TEST)

    def loader():
        for batch in TRAIN:
            model.train()
            yield batch

    found = fitted(model, loader()).logit_distribution(TEST)
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", [torch.arange(4), slice(None)], ids=["fails", "gives four"])
def test_a_function_of_outputs_that_knows_its_batch_is_not_asked_for_a_sequence_alone(rows):
    batch = tiny.batch(4, 5, padding=None)
    last = torch.full((4,), 4)
    known = Outputs(lambda output, _: output.logits[rows].expand(4, -1, -1)[torch.arange(4), last, :3])
    told = Outputs(lambda output, _: output.logits[:, -1, :3])
    model = tiny.tiny_llama()
    found, expected = (fitted(model, [batch], task).logit_distribution(batch) for task in (known, told))
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other)


def test_a_model_that_takes_no_sequence_alone():
    model = classifier(lambda hidden: hidden + 0 * hidden[1])
    with pytest.raises(InvalidBatchError, match=r"fails alone .*batches of one sequence"):
        fitted(model, [tiny.batch(4, 5, padding=None)], Classes())
