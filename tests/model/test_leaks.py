"""Gradients stay among an example's own real tokens, or are refused: in every batch, of a fit and of a prediction."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from laplace_lora_fast import Classes, InvalidBatchError, LaplaceLoRA, Outputs, UnsupportedAdapterError
from laplace_lora_fast.errors import DeferredChecks
from tests import tiny
from tests.model.taps import ANSWERS, read, tapped

STRUCTURES = ["kfac", "ekfac", "diagonal", "rows"]
DTYPE = torch.float64


@pytest.fixture(params=["at once", "deferred"])
def deferred(request, monkeypatch):
    """Whether conditions are read at the end, as on a GPU."""
    if request.param == "deferred":
        monkeypatch.setattr(DeferredChecks, "require", DeferredChecks._pend)
    return request.param == "deferred"


# Pads


def last_column(output, batch):
    return output.logits[:, -1, list(tiny.ANSWERS)]


LEAKY = {
    "bert pools the first position": (lambda: tiny.tiny_bert_classifier(3), Classes(), "left"),
    "the last position is read": (tiny.tiny_llama, Outputs(last_column), "right"),
    "one class reads a pad": (
        tiny.tiny_llama,
        Outputs(lambda out, _: torch.cat([out.logits[:, 2:3, 0:2], out.logits[:, -1:, 2:3]], 2)[:, 0]),
        "right",
    ),
}
BEFORE = {
    "nothing": [],
    "a batch without pads": [tiny.batch(4, padding=None, seed=1)],
    "one example": [tiny.batch(1, padding="left", seed=1)],  # it has no pads
}


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", LEAKY)
def test_gradients_of_pads_are_refused(name, structure, before):
    build, task, padding = LEAKY[name]
    la, padded = LaplaceLoRA(build(), task, structure=structure), tiny.batch(4, 7, padding=padding)
    with pytest.raises(InvalidBatchError, match=r"padded positions of layer '.*': pad on the other side"):
        la.fit([*BEFORE[before], padded], progress=False)
    la.fit([tiny.batch(4, padding=None)], progress=False)
    with pytest.raises(InvalidBatchError, match=r"padded positions of layer '.*': pad on the other side"):
        la.predictions([*BEFORE[before], padded], progress=False)
    other = tiny.batch(4, 7, padding={"left": "right", "right": "left"}[padding])
    if name != "one class reads a pad":
        la.fit([other], progress=False).predict(other)


def tiny_mamba():
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=0
    )
    return tiny.adapt(
        transformers.MambaForCausalLM(config), dtype=torch.float32, targets=("in_proj", "x_proj")
    )


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("structure", ["kfac", "rows"])
def test_gradients_of_pads_whose_inputs_are_zero_are_harmless(structure):
    """Mamba sets left pads to zero before every layer: nothing comes from them, though gradients get there."""
    model, train, test = tiny_mamba(), tiny.batch(5, padding="left"), tiny.batch(4, seed=1, padding="left")
    alone = [
        {"input_ids": ids[mask.bool()][None]}
        for ids, mask in zip(train["input_ids"], train["attention_mask"], strict=True)
    ]
    la = LaplaceLoRA(model, ANSWERS, structure=structure)
    expected = la.fit(alone, progress=False).logit_distribution(test)
    for got, value in zip(la.fit([train], progress=False).logit_distribution(test), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))


# Other examples


class TimeMajor(nn.Module):
    """Sequences first, as some layers of XLNet; `flat`: all tokens in one axis, position by position."""

    def __init__(self, flat):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(tiny.VOCAB, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.flat = flat

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids).mT.permute(2, 0, 1)
        tokens = hidden.flatten(0, 1) if self.flat else hidden
        return self.head(self.layer(tokens).tanh().view(hidden.shape).cumsum(0)[-1])


class Normalised(nn.Module):
    """Batch normalisation with the batch's own statistics."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(7, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8, track_running_stats=False)

    def forward(self, input_ids):
        return self.head(self.norm(self.layer(input_ids.double())).tanh())


class Routed(nn.Module):
    """A layer that sees the tokens below 10 only."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(tiny.VOCAB, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids):
        hidden, chosen = self.embed(input_ids).clone(), input_ids < 10
        hidden[chosen] = self.layer(hidden[chosen]).tanh()
        return self.head(hidden.mean(1))


class Similarities(nn.Module):
    """Logits of images against one text a class: the text layers' rows are classes."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(7, 8), nn.Linear(7, 8)

    def forward(self, input_ids, texts):
        return self.head(input_ids.double()) @ self.layer(texts).tanh().mT


def routed_tokens():
    ids = torch.full((4, 7), 20) + torch.arange(7)
    ids[0, :2], ids[2, 3], ids[3, 5] = 3, 4, 5
    return {"input_ids": ids}


SHARED = {
    "time first": (lambda: TimeMajor(False), lambda: tiny.batch(7, 7, padding=None)),
    "time first, flat": (lambda: TimeMajor(True), lambda: tiny.batch(4, 7, padding=None)),
    "batch statistics": (Normalised, lambda: tiny.batch(5, 7, padding=None)),
    "routed": (Routed, routed_tokens),
    "texts": (
        Similarities,
        lambda: tiny.batch(3, 7, padding=None) | {"texts": torch.randn(3, 7, dtype=DTYPE)},
    ),
}


def shared_model(name):
    torch.manual_seed(0)
    return tiny.adapt(SHARED[name][0](), targets=("layer",))


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", SHARED)
def test_rows_that_are_not_examples_are_refused(name, structure):
    la, batch = LaplaceLoRA(shared_model(name), Classes(), structure=structure), SHARED[name][1]()
    for _ in range(2):  # a refused batch has not been a check
        with pytest.raises(
            UnsupportedAdapterError, match=r"row n of what layer 'base_model.model.layer' sees"
        ):
            la.fit([batch], progress=False)


@pytest.mark.parametrize("structure", ["kfac", "rows"])
def test_rows_are_checked_in_the_first_batch_that_can_tell(structure, tmp_path):
    """Alone, an example's tokens are in order; so may be all of a fit."""
    la = LaplaceLoRA(shared_model("time first, flat"), Classes(), structure=structure)
    one, several = tiny.batch(1, padding=None), tiny.batch(4, padding=None)
    with pytest.raises(UnsupportedAdapterError, match="row n"):
        la.fit([one, several], progress=False)
    la.fit([one], progress=False)
    la.predict(one)
    with pytest.raises(UnsupportedAdapterError, match="row n"):
        la.predict(several)
    la.save(tmp_path)
    with pytest.raises(UnsupportedAdapterError, match="row n"):
        LaplaceLoRA.load(tmp_path, la.model).predict(several)


def counted_backward_passes(monkeypatch):
    passes, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (passes.append(1), grad(*a, **k))[1])
    return passes


@pytest.mark.parametrize("structure", ["kfac", "rows"])
def test_rows_are_checked_once(structure, monkeypatch, tmp_path):
    passes = counted_backward_passes(monkeypatch)
    la, batch = LaplaceLoRA(tiny.tiny_llama(), ANSWERS, structure=structure), tiny.batch(4)

    def count(call):
        passes.clear()
        call()
        return len(passes)

    proof = 2  # whose rows are whose, and gradients of one sequence to be compared
    assert count(lambda: la.fit([batch, batch], progress=False)) == proof + 2 * 2
    assert count(lambda: la.fit([batch], progress=False)) == 2
    assert count(lambda: la.predict(batch)) == 2
    la.save(tmp_path)
    la = LaplaceLoRA.load(tmp_path, la.model)
    assert count(lambda: la.predict(batch)) == proof + 2
    assert count(lambda: la.predict(batch)) == 2


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("padding", ["left", "right", None])
def test_the_check_of_rows_is_not_observed(checkpointing, autocast, padding):
    class Nothing:
        def observe_input(self, group, x, mask):
            self.seen = group

        def observe_gradient(self, layer, g, mask):
            pytest.fail("the check was observed")

    model = tiny.tiny_llama(dtype=torch.float32, targets=("q_proj", "v_proj", "lm_head"))
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    tap, head = tapped(model, ANSWERS, Nothing())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), tap:
        tap.prove(tap.forward(read(head, tiny.batch(4, padding=padding))))
        assert not head.rows_checked  # a check that waits for the device may still fail
    assert head.rows_checked
