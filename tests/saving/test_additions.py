"""What others have hung on a model between saving and loading is warned of."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from laplace_lora_fast import Answers, LaplaceLoRA, LaplaceWarning
from laplace_lora_fast.model.proofs.additions import additions, difference
from tests import tiny

ANSWERS = Answers(tiny.ANSWERS)
TRAIN, TEST = tiny.batch(4, seed=1), tiny.batch(3, seed=2)


def mlp(model):
    return model.get_submodule("base_model.model.model.layers.1.mlp")


def double(module, args, output):
    return 2 * output


def hook(model):
    mlp(model).register_forward_hook(double)


def pre_hook(model):
    mlp(model).register_forward_pre_hook(lambda module, args: (2 * args[0],))


def bound(factor, module, args, output):
    return factor * output


def partial_hook(model):
    mlp(model).register_forward_hook(partial(bound, 2))


def forward(model):
    former = mlp(model).forward
    mlp(model).forward = lambda x: 2 * former(x)


CHANGES = {
    "hook": (hook, "layers.1.mlp: forward hook tests.saving.test_additions.double"),
    "pre-hook": (pre_hook, "layers.1.mlp: forward pre-hook tests.saving.test_additions"),
    "partial": (partial_hook, "layers.1.mlp: forward hook tests.saving.test_additions.bound"),
    "forward": (forward, r"layers.1.mlp: forward tests.saving.test_additions.forward.<locals>.<lambda>"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("posterior")
    LaplaceLoRA(tiny.tiny_llama(), ANSWERS).fit([TRAIN], progress=False).save(path)
    return path


@pytest.mark.parametrize("kind", CHANGES)
def test_what_has_come_since_the_fit(kind, folder):
    change, words = CHANGES[kind]
    model = tiny.tiny_llama()
    change(model)
    with pytest.warns(LaplaceWarning, match=rf"the model has '.*{words}"):
        LaplaceLoRA.load(folder, model)


def test_what_has_gone_since_the_fit(tmp_path):
    model = tiny.tiny_llama()
    hook(model)
    la = LaplaceLoRA(model, ANSWERS).fit([TRAIN], progress=False)
    la.save(tmp_path)
    with pytest.warns(LaplaceWarning, match="the model lacks .*test_additions.double"):
        LaplaceLoRA.load(tmp_path, tiny.tiny_llama())
    again = tiny.tiny_llama()
    hook(again)
    loaded = LaplaceLoRA.load(tmp_path, again)  # no warning
    torch.testing.assert_close(loaded.predict(TEST), la.predict(TEST))


def test_a_class_whose_forward_is_replaced(folder, monkeypatch):
    model = tiny.tiny_llama()
    monkeypatch.setattr(type(mlp(model)), "forward", lambda self, x: 0 * x)
    with pytest.warns(LaplaceWarning, match=r"forward of LlamaMLP tests\.saving\.test_additions"):
        LaplaceLoRA.load(folder, model)


def test_what_the_makers_of_the_model_hang_on_it_says_nothing():
    model = tiny.tiny_llama()
    assert additions(model) == []
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    model(**{key: TEST[key] for key in ("input_ids", "attention_mask")}, output_hidden_states=True)
    assert additions(torch.compile(model, backend="eager")) == []


def test_the_difference():
    assert difference(["a"], ["a"]) == ""
    assert difference(["a"], ["b"]) == "has 'b' and lacks 'a'"
    assert difference([], list("abcde")) == "has 'a', 'b', 'c' and 2 more"
