"""Which layers are fed by one tensor, whose statistics are then gathered once; and what inputs may not do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace_lora_fast import Classes, InvalidBatchError, LaplaceLoRA, Outputs, UnsupportedAdapterError
from tests import tiny
from tests.model.taps import ANSWERS, LLAMA_ALL, Recorder, assert_same_gradients, read, tapped


def groups_by_name(model, task):
    tap, head = tapped(model, task, Recorder())
    with tap:
        assert tap.shared_inputs is None
        tap.forward(read(head, tiny.batch(2, padding="right")))
    groups = {}
    for layer, group in zip(tap.layers, tap.shared_inputs, strict=True):
        groups.setdefault(group, set()).add(".".join(layer.name.split(".")[-4:]))
    return sorted(map(sorted, groups.values()))


def test_layers_fed_by_one_tensor_are_recognised():
    expected = []
    for layer in "01":
        attention, mlp = f"layers.{layer}.self_attn.", f"layers.{layer}.mlp."
        expected += [
            [attention + name for name in ("k_proj", "q_proj", "v_proj")],
            [attention + "o_proj"],
            [mlp + "down_proj"],
            [mlp + name for name in ("gate_proj", "up_proj")],
        ]
    assert groups_by_name(tiny.tiny_llama(targets=LLAMA_ALL), ANSWERS) == sorted(expected)


def test_encoder_layers_fed_by_one_tensor_are_recognised():
    model = tiny.tiny_bert_classifier(2, targets=("query", "key", "value", "classifier"))
    assert sorted(map(len, groups_by_name(model, Classes()))) == [1, 3, 3]


class Sometimes(nn.Module):
    """Two layers that are fed by one tensor in batches of even length, by two in others."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        other = x if x.shape[1] % 2 == 0 else x.clone()
        return self.head((self.first(x) * self.second(other).tanh()).mean(1))


def test_inputs_that_are_no_longer_shared():
    model = tiny.adapt(Sometimes(), targets=("first", "second"), r=2)
    shared, apart = ({"x": torch.randn(3, length, 4, dtype=torch.float64)} for length in (2, 3))
    la = LaplaceLoRA(model, Classes())
    with pytest.raises(InvalidBatchError, match=r"'base_model.model.second' no longer shares its input"):
        la.fit([shared, apart], progress=False)
    la.fit([shared], progress=False)
    with pytest.raises(InvalidBatchError, match=r"'base_model.model.second' no longer shares its input"):
        la.predict(apart)
    expected = LaplaceLoRA(model, Classes()).fit([apart], progress=False).predict(shared)
    later = LaplaceLoRA(model, Classes()).fit([apart], progress=False)
    assert torch.equal(later.predict(shared), expected)  # apart at first: shared later is harmless


class Twice(nn.Module):
    """One layer runs twice; `both`: two layers do, fed by one tensor each time."""

    def __init__(self, both=False):
        super().__init__()
        self.shared, self.beside, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.both = both

    def forward(self, x):
        for _ in range(2):
            x = self.shared(x).tanh() * (self.beside(x) if self.both else 1)
        return self.head(x)


@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4)])
@pytest.mark.parametrize("both", [False, True])
def test_a_layer_that_runs_twice(both, shape):
    """Its weights are shared by the tokens of both runs."""
    targets = ("shared", "beside", "head") if both else ("shared", "head")
    model = tiny.adapt(Twice(both), targets=targets, r=2)
    summed = Outputs(lambda output, _: output.flatten(1, -2).sum(1) if output.dim() > 2 else output)
    assert_same_gradients(model, {"x": torch.randn(*shape, dtype=torch.float64)}, summed)


class OftenEnough(nn.Module):
    """A layer that runs as often as there are tokens."""

    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        for _ in range(x.shape[1]):
            x = self.shared(x).tanh()
        return self.head(x.mean(1))


def test_a_layer_that_runs_more_often_than_in_the_first_batch():
    la = LaplaceLoRA(tiny.adapt(OftenEnough(), targets=("shared",), r=2), Classes())
    batches = [{"x": torch.randn(3, length, 4, dtype=torch.float64)} for length in (2, 3)]
    with pytest.raises(
        InvalidBatchError, match=r"'base_model.model.shared' runs more often than in the first"
    ):
        la.fit(batches, progress=False)


class ChangesItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        hidden = 2 * x
        first = self.first(hidden)
        hidden += 1
        return self.head(first * self.second(hidden))


@pytest.mark.parametrize("targets", [("first",), ("first", "second")])
def test_an_input_that_is_changed_in_place_after_its_layer(targets):
    """Training such a model is legal when dropout or a cast makes PEFT work on a copy."""
    model = tiny.adapt(ChangesItsInput(), targets=targets, r=2)
    with pytest.raises(
        UnsupportedAdapterError, match=r"input of layer 'base_model.model.first' is changed in place"
    ):
        LaplaceLoRA(model, Classes()).fit([{"x": torch.randn(3, 4, dtype=torch.float64)}], progress=False)
