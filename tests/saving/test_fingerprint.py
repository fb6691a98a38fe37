"""A posterior is used with the model it was fitted on, and no other."""

from __future__ import annotations

import shutil

import peft
import pytest
import torch
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from laplace_lora_fast import (
    Classes,
    HeldOut,
    LaplaceLoRA,
    NotFittedError,
    StateError,
    UnsupportedAdapterError,
)
from laplace_lora_fast.saving import fingerprint
from laplace_lora_fast.saving.sums import plain_parts
from laplace_lora_fast.saving.surroundings import Surroundings
from tests import tiny
from tests.model.taps import ANSWERS

LAYER = "base_model.model.model.layers.1.self_attn.v_proj"


def uses(la, tmp_path):
    """Whatever a fit is used for."""
    return {
        "predict": lambda: la.predict(tiny.batch(2)),
        "map": lambda: la.predict(tiny.batch(2), link_approx="map"),
        "logit_distribution": lambda: la.logit_distribution(tiny.batch(2)),
        "predictions": lambda: la.predictions([tiny.batch(2)], progress=False),
        "evidence": lambda: la.log_marginal_likelihood(),
        "tune": lambda: la.optimize_prior_precision(),
        "held out": lambda: la.optimize_prior_precision(HeldOut([tiny.batch(2)]), progress=False),
        "posterior": lambda: la.posterior,
        "sample": lambda: la.sample_adapters(tmp_path / "samples", 1, force=True),
        "save": lambda: la.save(tmp_path / "posterior"),
        "summary": lambda: la.summary(),
    }


@pytest.mark.parametrize(
    "how", ["in place", "data", "replaced", "optimizer", "fused optimizer", "loaded", "hot-swapped"]
)
def test_adapter_weights_changed_after_fit(how, tmp_path):
    model = tiny.tiny_llama()
    la = LaplaceLoRA(model, ANSWERS).fit([tiny.batch(3)], progress=False)
    layer = model.get_submodule(LAYER).lora_B["default"]
    if how == "in place":
        with torch.no_grad():
            layer.weight[0, 0] += 1e-6
    elif how == "data":
        layer.weight.data[0, 0] += 1e-6
    elif how == "replaced":
        layer.weight = nn.Parameter(layer.weight.detach() * 1.01)
    elif how == "loaded":
        model.load_state_dict({f"{LAYER}.lora_B.default.weight": layer.weight.detach() + 0.1}, strict=False)
    elif how == "hot-swapped":
        changed = tiny.tiny_llama()
        with torch.no_grad():
            changed.get_submodule(LAYER).lora_B["default"].weight.mul_(2)
        changed.save_pretrained(tmp_path / "adapter")
        hotswap_adapter(model, tmp_path / "adapter", "default", "cpu")
        shutil.rmtree(tmp_path / "adapter")
    else:
        optimizer = torch.optim.SGD([layer.weight], lr=0.1, fused=how == "fused optimizer")
        model(**tiny.batch(2, labels=False)).logits.sum().backward()
        optimizer.step()
    for use, call in uses(la, tmp_path).items():
        with pytest.raises(NotFittedError, match=rf"'{LAYER}' changed since fit"):
            pytest.fail(f"{use} gave {call()}")
    assert list(tmp_path.iterdir()) == []
    la.fit([tiny.batch(3)], progress=False)
    assert la.predict(tiny.batch(2)).isfinite().all()


def test_rewriting_the_same_weights_is_no_change():
    model = tiny.tiny_llama()
    la = LaplaceLoRA(model, ANSWERS).fit([tiny.batch(3)], progress=False)
    expected = la.predict(tiny.batch(2))
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    assert torch.equal(la.predict(tiny.batch(2)), expected)


def test_on_a_gpu_the_weights_are_asked_about_after_the_last_batch(monkeypatch):
    """Here the flags pretend to be elsewhere: entering must not read them, leaving must."""
    model = tiny.tiny_llama()
    la = LaplaceLoRA(model, ANSWERS).fit([tiny.batch(3)], progress=False)
    read = []

    class Elsewhere:
        device = torch.device("meta")

        def tolist(self):
            read.append(True)
            return [True, True, False] + [True] * 5

    def batches():
        yield tiny.batch(2)
        assert not read

    monkeypatch.setattr(fingerprint, "unchanged_weights", lambda *_: Elsewhere())
    with pytest.raises(NotFittedError, match="changed since fit"):
        la.predictions(batches(), progress=False)
    assert read == [True]


def test_scaling_changed_after_fit(tmp_path):
    model = tiny.tiny_llama()
    la = LaplaceLoRA(model, ANSWERS).fit([tiny.batch(3)], progress=False)
    expected = la.predict(tiny.batch(2))
    with rescale_adapter_scale(model, 0.5):
        for use, call in uses(la, tmp_path).items():
            with pytest.raises(NotFittedError, match=r"scaling of layer '[\w.]+q_proj' changed from 2 to 1"):
                pytest.fail(f"{use} gave {call()}")
    assert torch.equal(la.predict(tiny.batch(2)), expected)
    model.get_submodule(LAYER).scale_layer(3)
    with pytest.raises(NotFittedError, match=rf"'{LAYER}' changed from 2 to 6"):
        la.predict(tiny.batch(2))
    la.fit([tiny.batch(3)], progress=False)
    assert la.predict(tiny.batch(2)).isfinite().all()


@pytest.mark.parametrize("how", ["deleted", "unloaded"])
def test_adapter_gone_after_fit(how, tmp_path):
    model = tiny.tiny_llama()
    la = LaplaceLoRA(model, ANSWERS).fit([tiny.batch(3)], progress=False)
    if how == "deleted":
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
        model.delete_adapter("default")
    else:
        model.unload()
    for use, call in uses(la, tmp_path).items():
        with pytest.raises(NotFittedError, match=r"layer '[\w.]+q_proj' with adapter 'default' is gone"):
            pytest.fail(f"{use} gave {call()}")


def with_head(score=0.0, base=0.0, **lora):
    """A classifier whose head is trained with the adapter, and whose head or base weight is shifted."""
    model = tiny.tiny_llama_classifier(3, modules_to_save=["score"], **lora)
    with torch.no_grad():
        model.get_parameter("base_model.model.score.modules_to_save.default.weight")[0, 0] += score
        model.get_parameter(f"{LAYER}.base_layer.weight")[0, 0] += base
    return model


WITHOUT_HEAD = {"layers": lambda name: "modules_to_save" not in name}
CHANGES = {
    "head": ({"score": 1e-3}, r"'base_model.model.score.modules_to_save.default.weight'"),
    "base": ({"base": 1e-3}, rf"'{LAYER}.base_layer.weight'"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_frozen_weights_differ_at_load(what, tmp_path):
    change, name = CHANGES[what]
    la = LaplaceLoRA(with_head(), Classes(), **WITHOUT_HEAD).fit([tiny.batch(3)], progress=False)
    la.save(tmp_path)
    assert torch.equal(
        LaplaceLoRA.load(tmp_path, with_head()).predict(tiny.batch(2)), la.predict(tiny.batch(2))
    )
    with pytest.raises(StateError, match=rf"parameter {name} is not the one the posterior was fitted with"):
        LaplaceLoRA.load(tmp_path, with_head(**change))


@pytest.mark.parametrize("what", CHANGES)
def test_frozen_weights_change_after_fit(what, tmp_path):
    change, name = CHANGES[what]
    model = with_head()
    la = LaplaceLoRA(model, Classes(), **WITHOUT_HEAD).fit([tiny.batch(3)], progress=False)
    parameter, shift = model.get_parameter(name.strip("'")), next(iter(change.values()))
    former = parameter.detach().clone()
    with torch.no_grad():
        parameter[0, 0] += shift
    for use, call in uses(la, tmp_path).items():
        with pytest.raises(NotFittedError, match=rf"parameter {name} changed since fit"):
            pytest.fail(f"{use} gave {call()}")
    with torch.no_grad():
        parameter.copy_(former)
    assert la.predict(tiny.batch(2)).isfinite().all()
    parameter.data[0, 0] += shift  # counts no version
    with pytest.raises(NotFittedError, match=rf"parameter {name} changed since fit"):
        la.save(tmp_path)


def test_another_base_model_of_the_same_distribution(tmp_path):
    """In another precision too, where single weights may differ by rounding."""
    model = tiny.tiny_llama(torch.float32)
    LaplaceLoRA(model, ANSWERS).fit([tiny.batch(3)], progress=False).save(tmp_path)
    LaplaceLoRA.load(tmp_path, tiny.tiny_llama(torch.float32).to(torch.bfloat16))
    other = tiny.tiny_llama(torch.float32)
    for layer in LaplaceLoRA(other, ANSWERS).layers:
        nn.init.normal_(layer.module.base_layer.weight, std=0.3)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(StateError, match=r"q_proj.base_layer.weight' is not the one"):
            LaplaceLoRA.load(tmp_path, other.to(dtype))


def test_another_lora_alpha_at_load(tmp_path):
    LaplaceLoRA(tiny.tiny_llama(), ANSWERS).fit([tiny.batch(3)], progress=False).save(tmp_path)
    with pytest.raises(
        StateError, match=r"q_proj' has scaling 1, the posterior was fitted with 2: check lora_alpha"
    ):
        LaplaceLoRA.load(tmp_path, tiny.tiny_llama(lora_alpha=4))


class Packed:
    """A tensor of a kind of its own, which says what it is made of, as torchao's do."""

    def __init__(self, **parts):
        vars(self).update(parts)

    def __tensor_flatten__(self):
        return list(vars(self)), None


def test_parts_of_quantised_weights():
    scale, packed = torch.ones(3), torch.arange(6, dtype=torch.uint8)
    assert [name for name, _ in plain_parts("w", Packed(packed=packed, scale=scale))] == [
        "w#packed",
        "w#scale",
    ]
    weight = nn.Parameter(torch.ones(2))
    weight.SCB = scale
    assert [name for name, _ in plain_parts("w", weight)] == ["w", "w#SCB"]


def nf4(seed=0):
    """NF4 of bitsandbytes below the adapters."""
    model = tiny.tiny_llama(torch.float32)
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(seed)
    base = model.unload()
    for layer in base.model.layers:
        for name in ("q_proj", "v_proj", "o_proj"):
            former = getattr(layer.self_attn, name)
            new = bnb.nn.Linear4bit(former.in_features, former.out_features, bias=False, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(
                former.weight.detach().clone(), requires_grad=False, quant_type="nf4"
            )
            setattr(layer.self_attn, name, new.to("cpu"))
    return tiny.adapt(base, torch.float32)


def test_quantised_base_weights_are_compared():
    model, other = nf4(), nf4()
    layers = LaplaceLoRA(model, ANSWERS).layers
    one, two = Surroundings.of(model, layers), Surroundings.of(other, LaplaceLoRA(other, ANSWERS).layers)
    assert one.difference(two) is None
    assert one.tensors[f"{LAYER}.base_layer.weight"].dtype == "uint8"
    assert f"{LAYER}.base_layer.weight#quant_state.absmax" in one.derived
    weight = other.get_submodule(LAYER).base_layer.weight
    weight.quant_state.absmax.view(torch.uint8)[-1] ^= 64
    two = Surroundings.of(other, LaplaceLoRA(other, ANSWERS).layers)
    assert LAYER in one.difference(two)
    weight.quant_state.absmax.view(torch.uint8)[-1] ^= 64
    weight.data[0, 0] ^= 1
    two = Surroundings.of(other, LaplaceLoRA(other, ANSWERS).layers)
    assert LAYER in one.difference(two)


def test_weights_that_are_nowhere_are_passed_over():
    model = tiny.tiny_llama()
    layers = LaplaceLoRA(model, ANSWERS).layers
    before = Surroundings.of(model, layers)
    norm = model.base_model.model.model.norm
    norm.weight = nn.Parameter(torch.empty(16, device="meta"))
    after = Surroundings.of(model, layers)
    assert after.tensors["base_model.model.model.norm.weight"] is None
    assert before.difference(after) is None


def test_merging_is_refused_and_what_it_leaves_is_forgiven():
    model = tiny.tiny_llama(torch.float32)
    la = LaplaceLoRA(model, ANSWERS).fit([tiny.batch(3)], progress=False)
    model.merge_adapter()
    with pytest.raises(UnsupportedAdapterError, match="merged"):
        la.predict(tiny.batch(2))
    model.unmerge_adapter()
    assert la.predict(tiny.batch(2)).isfinite().all()
