"""Which LoRA layers get a posterior."""

from __future__ import annotations

import pytest

from laplace_lora_fast import Answers, LaplaceLoRA, UnsupportedAdapterError
from tests import tiny
from tests.oracle import assert_close


def test_what_layers_selects() -> None:
    model = tiny.tiny_llama()
    everything = LaplaceLoRA(model, Answers(tiny.ANSWERS), structure="kfac")
    names = [layer.name for layer in everything.layers]
    last = LaplaceLoRA(model, Answers(tiny.ANSWERS), layers="last")
    assert [layer.name for layer in last.layers] == names[2:]
    chosen = LaplaceLoRA(model, Answers(tiny.ANSWERS), layers=[names[1]], structure="kfac")
    assert [layer.name for layer in chosen.layers] == [names[1]]
    values = LaplaceLoRA(model, Answers(tiny.ANSWERS), layers=lambda name: "v_proj" in name)
    assert [layer.name for layer in values.layers] == names[1::2]
    data = tiny.batch(5)
    everything.fit([data], progress=False)
    chosen.fit([data], progress=False)
    assert_close(
        chosen.factors[names[1]].B.gradient_factor, everything.factors[names[1]].B.gradient_factor, 1e-12
    )
    with pytest.raises(UnsupportedAdapterError, match="nowhere"):
        LaplaceLoRA(model, Answers(tiny.ANSWERS), layers=["nowhere"])
    with pytest.raises(ValueError, match="layers"):
        LaplaceLoRA(model, Answers(tiny.ANSWERS), layers="first")


def test_last_layer_is_the_adapted_head_where_there_is_one() -> None:
    model = tiny.tiny_llama(targets=("q_proj", "lm_head"))
    la = LaplaceLoRA(model, Answers(tiny.ANSWERS), layers="last").fit([tiny.batch(5)], progress=False)
    assert [layer.name for layer in la.layers] == ["base_model.model.lm_head"]
    assert la.predict(tiny.batch(2)).shape == (2, 3)
