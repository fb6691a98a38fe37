"""Models that are not covered are refused by a typed error that names the layer, whenever they become so."""

from __future__ import annotations

import accelerate
import peft
import pytest
import torch
import transformers
from torch import nn

from laplace_lora_fast import KFAC, Classes, InvalidBatchError, LaplaceLoRA, Outputs, UnsupportedAdapterError
from tests import tiny
from tests.model.taps import ANSWERS


def add_other(model, targets=("q_proj", "v_proj")):
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=list(targets)))
    tiny.randomise(model, 3)
    return model


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(2, 2)

    def forward(self, pixels):
        return self.head(self.conv(pixels).mean((-1, -2)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.mix(x, x, x)[0].mean(1))


def with_two_adapters():
    model = add_other(tiny.tiny_llama())
    model.base_model.set_adapter(["default", "other"])
    return model


def merged():
    model = tiny.tiny_llama()
    model.merge_adapter()
    return model


def disabled():
    model = tiny.tiny_llama()
    model.disable_adapter_layers()
    return model


def unadapted():
    return transformers.LlamaForCausalLM(tiny.tiny_llama().config)


def with_ia3():
    return peft.get_peft_model(unadapted(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))


def with_adalora():
    return peft.get_peft_model(unadapted(), peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10))


MODELS = {
    "plain model": (unadapted, "no LoRA layer"),
    "unadapted torch module": (Images, "no LoRA layer"),
    "IA3": (with_ia3, "ia3, not LoRA"),
    "AdaLoRA": (with_adalora, r"'[\w.]+q_proj'.*SVDLinear"),
    "embedding": (
        lambda: tiny.tiny_llama(targets=("q_proj", "embed_tokens")),
        r"'[\w.]+embed_tokens'.*linear",
    ),
    "convolution": (
        lambda: tiny.adapt(Images(), targets=("conv", "head")),
        r"'base_model.model.conv'.*linear",
    ),
    "fused attention": (lambda: tiny.adapt(Attention(), targets=("mix",)), r"'base_model.model.mix'.*linear"),
    "merged": (merged, r"'[\w.]+layers.0.self_attn.q_proj'.*unmerge_adapter"),
    "disabled": (disabled, r"'[\w.]+layers.0.self_attn.q_proj'.*disabled"),
    "two active": (with_two_adapters, r"'[\w.]+q_proj'.*\['default', 'other'\].*set_adapter"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_are_not_covered(name):
    build, match = MODELS[name]
    with pytest.raises(UnsupportedAdapterError, match=match):
        LaplaceLoRA(build(), Classes())


def test_prior_mean_of_another_shape_or_without_a_layer():
    model = tiny.tiny_llama()
    state = {k: v for k, v in model.state_dict().items() if "lora" in k}
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight"
    for broken in ({k: v for k, v in state.items() if k != key}, state | {key: state[key][:2]}):
        with pytest.raises(UnsupportedAdapterError, match=key):
            LaplaceLoRA(model, ANSWERS, prior_mean=broken)


# Answers


def test_answers_need_a_language_model():
    for model in (
        tiny.tiny_llama_classifier(2),
        tiny.tiny_bert_classifier(2),
        tiny.adapt(Images(), targets=("head",)),
    ):
        with pytest.raises(ValueError, match=r"Answers needs a causal language model"):
            LaplaceLoRA(model, ANSWERS)


def tiny_t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return tiny.adapt(transformers.T5ForConditionalGeneration(config), targets=("q", "v"))


SMALL = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
NOT_CAUSAL = {
    "T5ForConditionalGeneration": tiny_t5,
    "BertForMaskedLM": lambda: tiny.adapt(
        transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, num_attention_heads=2)),
        targets=("query", "value"),
    ),
    "RobertaForMaskedLM": lambda: tiny.adapt(
        transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL, num_attention_heads=2)),
        targets=("query", "value"),
    ),
}


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_answers_are_not_at_the_last_position_of_other_language_models(name):
    with pytest.raises(ValueError, match=rf"causal language model, {name} answers at .*Outputs\(function\)"):
        LaplaceLoRA(NOT_CAUSAL[name](), ANSWERS)


@pytest.mark.parametrize("length", [1, 9])
def test_kfac_of_a_decoder_of_another_length_than_its_encoder(length):
    """Rows take its Jacobian by autograd: see test_alone.py."""
    task = Outputs(lambda output, _: output.logits[:, -1, :3])
    batch = tiny.batch(4, padding="right") | {"decoder_input_ids": torch.full((4, length), 7)}
    model = tiny_t5()
    with pytest.raises(
        InvalidBatchError, match=rf"'[\w.]+decoder[\w.]+' sees {length} tokens of the decoder"
    ):
        LaplaceLoRA(model, task, structure=KFAC()).fit([batch], progress=False)
    la = LaplaceLoRA(model, task, structure=KFAC(), layers=lambda name: ".encoder." in name)
    assert la.fit([batch], progress=False).predict(batch).isfinite().all()


def test_detached_logits():
    la = LaplaceLoRA(tiny.tiny_llama(), Outputs(lambda out, _: out.logits[:, -1, :3].detach()))
    with pytest.raises(UnsupportedAdapterError, match="do not depend on any LoRA layer"):
        la.fit([tiny.batch(3)], progress=False)


# Where the weights are


@pytest.mark.parametrize("offload", [accelerate.cpu_offload, accelerate.disk_offload])
def test_offloaded_weights(offload, tmp_path):
    model = tiny.tiny_llama(torch.float32)
    folder = {"offload_dir": tmp_path} if offload is accelerate.disk_offload else {}
    la = LaplaceLoRA(model, ANSWERS)
    offload(model, execution_device=torch.device("cpu"), **folder)
    for call in (lambda: LaplaceLoRA(model, ANSWERS), lambda: la.fit([tiny.batch(2)], progress=False)):
        with pytest.raises(
            UnsupportedAdapterError, match=r"layer '[\w.]+q_proj' is offloaded: load the model"
        ):
            call()


def test_model_made_in_inference_mode():
    with torch.inference_mode():
        model = tiny.tiny_llama()
    with pytest.raises(UnsupportedAdapterError, match=r"'[\w.]+weight' was made in torch.inference_mode"):
        LaplaceLoRA(model, ANSWERS)


# After the fit


def test_adapter_switched_merged_or_disabled_after_fit():
    model = add_other(tiny.tiny_llama())
    la = LaplaceLoRA(model, ANSWERS).fit([tiny.batch(3)], progress=False)
    expected = la.predict(tiny.batch(2))

    def refused(match):
        for link in ("probit", "map"):
            with pytest.raises(UnsupportedAdapterError, match=match):
                la.predict(tiny.batch(2), link_approx=link)

    model.set_adapter("other")
    refused(r"'[\w.]+q_proj' has adapter 'other' active, expected 'default'")
    model.set_adapter("default")
    with model.disable_adapter():
        refused(r"'[\w.]+q_proj'.*disabled")
    model.merge_adapter()
    refused(r"'[\w.]+q_proj'.*merged")
    model.unmerge_adapter()
    torch.testing.assert_close(la.predict(tiny.batch(2)), expected)


def test_another_adapter_fitted_with_the_prior_of_the_first():
    model = add_other(tiny.tiny_llama(), ("k_proj",))
    train, test = [tiny.batch(3)], tiny.batch(2)
    by_name = {layer.name: 2.0 for layer in LaplaceLoRA(model, ANSWERS).layers}
    centred = LaplaceLoRA(model, ANSWERS, structure="kfac", prior_mean=model.state_dict())
    by_layer = LaplaceLoRA(model, ANSWERS, structure="kfac", prior_precision=by_name)
    expected = [la.fit(train, progress=False).predict(test) for la in (centred, by_layer)]
    model.set_adapter("other")
    with pytest.raises(UnsupportedAdapterError, match="prior_mean belongs to adapter 'default'"):
        centred.fit(train, progress=False)
    with pytest.raises(ValueError, match="prior_precision"):
        by_layer.fit(train, progress=False)
    model.set_adapter("default")
    for la, probs in zip((centred, by_layer), expected, strict=True):
        assert torch.equal(la.predict(test), probs)
    model.set_adapter("other")
    other = LaplaceLoRA(model, ANSWERS, structure="kfac").fit(train, progress=False)
    model.set_adapter("default")
    other.fit(train, progress=False)  # one number serves any adapter
    assert set(other.factors) == set(by_name)
