"""Which layers are fed by one tensor, whose statistics are then gathered once; and what inputs may not do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace_lora_fast import Classes, InvalidBatchError, LaplaceLoRA, UnsupportedAdapterError
from tests import tiny
from tests.model.taps import ANSWERS, LLAMA_ALL, Recorder, read, tapped


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
    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.shared(self.shared(x)))


def test_a_layer_that_runs_twice():
    la = LaplaceLoRA(tiny.adapt(Twice(), targets=("head", "shared"), r=2), Classes())
    with pytest.raises(UnsupportedAdapterError, match=r"'base_model.model.shared' ran twice"):
        la.fit([{"x": torch.randn(3, 4, dtype=torch.float64)}], progress=False)


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
