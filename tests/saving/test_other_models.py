"""A posterior on a model that differs somewhere outside the LoRA weights: refused on loading and in one process."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

from laplace_lora_fast import Classes, LaplaceLoRA, NotFittedError, StateError
from laplace_lora_fast.saving.surroundings import Surroundings
from laplace_lora_fast.saving.watch import Watch
from tests import tiny
from tests.model.taps import ANSWERS

TEST = tiny.batch(3, seed=9, labels=False)


def shift(suffix, by=0.3):
    """Of one number of each of these parameters."""

    def change(model):
        for name, parameter in model.named_parameters():
            if suffix in name and "lora" not in name:
                with torch.no_grad():
                    parameter.view(-1)[parameter.numel() // 2] += by

    return change


def exchange_rows(model):
    with torch.no_grad():
        weight = model.base_model.model.model.embed_tokens.weight
        weight[[3, 5]] = weight[[5, 3]]


def norm_eps(model):
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = 0.5


def one_norm_eps(model):
    model.base_model.model.model.norm.eps = 0.5


def set_config(**values):
    def change(model):
        for key, value in values.items():
            setattr(model.base_model.model.config, key, value)

    return change


def nested_config(model):
    model.base_model.model.config.rope_parameters["rope_theta"] = 77.0


def frequencies(model):
    model.base_model.model.model.rotary_emb.inv_freq *= 1.1


def other_scaling(model):
    for module in model.base_model.model.model.layers[1].self_attn.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, float):
            module.scaling *= 1.5


def merged_into_mlp(model):
    """As if by another adapter."""
    for layer in model.base_model.model.model.layers:
        weight = layer.mlp.up_proj.weight
        with torch.no_grad():
            weight += (
                0.05 * torch.randn(24, 1, generator=torch.Generator().manual_seed(0)).to(weight) @ weight[:1]
            )


def biased(model):
    model.base_model.model.model.norm.register_parameter(
        "bias", nn.Parameter(torch.ones(16, dtype=torch.float64))
    )


CHANGES = {
    "base weight": (shift("q_proj"), "q_proj"),
    "MLP": (shift("mlp"), "mlp"),
    "projection without LoRA": (shift("o_proj"), "o_proj"),
    "embeddings": (shift("embed_tokens"), "embed_tokens"),
    "rows of the embeddings": (exchange_rows, "embed_tokens"),
    "head": (shift("lm_head", 1e-12), "lm_head"),
    "norms": (shift("norm"), "norm"),
    "eps of all norms": (norm_eps, r"RMSNorm.eps \(1e-06 then, 0.5 now\)|eps of module"),
    "eps of one norm": (one_norm_eps, r"RMSNorm.eps|eps of module '[\w.]+model.norm'"),
    "configuration": (set_config(rms_norm_eps=0.5), "rms_norm_eps"),
    "nested configuration": (nested_config, "rope_parameters"),
    "frequencies": (frequencies, "inv_freq"),
    "scaling of attention": (other_scaling, "LlamaAttention.scaling|scaling of module"),
    "an adapter merged into the MLP": (merged_into_mlp, "up_proj"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    la = LaplaceLoRA(tiny.tiny_llama(), ANSWERS).fit([tiny.batch(5)], progress=False)
    la.save(folder)
    return folder, la.predict(TEST)


@pytest.mark.parametrize("name", CHANGES)
def test_on_loading(name, saved):
    change, match = CHANGES[name]
    model = tiny.tiny_llama()
    assert torch.equal(LaplaceLoRA.load(saved[0], model).predict(TEST), saved[1])
    change(model)
    with pytest.raises(StateError, match=rf"({match}).*is not the one the posterior was fitted with"):
        LaplaceLoRA.load(saved[0], model)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_in_one_process(name, loaded, saved):
    change, match = CHANGES[name]
    model = tiny.tiny_llama()
    la = LaplaceLoRA.load(saved[0], model) if loaded else LaplaceLoRA(model, ANSWERS)
    if not loaded:
        la.fit([tiny.batch(5)], progress=False)
    assert torch.equal(la.predict(TEST), saved[1])
    change(model)
    for use in (lambda: la.predict(TEST), lambda: la.posterior, lambda: la.predict(TEST, link_approx="map")):
        with pytest.raises(NotFittedError, match=rf"({match}).*changed since fit"):
            use()


def test_another_parameter(saved):
    model = tiny.tiny_llama()
    biased(model)
    with pytest.raises(StateError, match=r"norm.bias', which one of the models does not have"):
        LaplaceLoRA.load(saved[0], model)


def test_replaced_modules():
    model = tiny.tiny_llama()
    la = LaplaceLoRA(model, ANSWERS).fit([tiny.batch(5)], progress=False)
    mlp = model.base_model.model.model.layers[0].mlp
    former, mlp.act_fn = mlp.act_fn, nn.ReLU()
    with pytest.raises(NotFittedError, match=r"module '[\w.]+mlp.act_fn' changed since fit"):
        la.predict(TEST)
    mlp.act_fn = former
    la.predict(TEST)
    model.base_model.model.model.norm = copy.deepcopy(model.base_model.model.model.norm)
    with pytest.raises(NotFittedError, match=r"model.norm' changed since fit"):
        la.predict(TEST)


def test_what_answers_do_not_depend_on(saved, tmp_path):
    """Other adapters, training mode, dropout, names, and how generation is done."""
    model = tiny.tiny_llama()
    la = LaplaceLoRA(model, ANSWERS).fit([tiny.batch(5)], progress=False)
    expected = la.predict(TEST)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], lora_dropout=0.2))
    model.train()
    config = model.base_model.model.config
    config.use_cache, config._name_or_path, config.attention_dropout, config.eos_token_id = False, "x", 0.3, 9
    config.id2label = {0: "no", 1: "yes"}
    model.gradient_checkpointing_enable()
    assert torch.equal(la.predict(TEST), expected)
    assert torch.equal(LaplaceLoRA.load(saved[0], model).predict(TEST), expected)
    la.save(tmp_path)
    assert torch.equal(LaplaceLoRA.load(tmp_path, tiny.tiny_llama()).predict(TEST), expected)
    model.delete_adapter("other")
    la.predict(TEST)


def test_the_original_of_a_trained_head_does_not_matter(tmp_path):
    """A classifier's is drawn anew each time the model is loaded."""
    model = tiny.tiny_llama_classifier(3, modules_to_save=["score"])
    la = LaplaceLoRA(model, Classes()).fit([tiny.batch(5)], progress=False)
    la.save(tmp_path)
    nn.init.normal_(model.base_model.model.score.original_module.weight)
    assert torch.equal(la.predict(TEST), LaplaceLoRA.load(tmp_path, model).predict(TEST))
    with torch.no_grad():
        weight = model.base_model.model.score.modules_to_save["default"].weight
        weight[[0, 1]] = weight[[1, 0]]
    with pytest.raises(StateError, match=r"score.modules_to_save.default"):
        LaplaceLoRA.load(tmp_path, model)


def test_a_pad_token_matters_to_classifiers(tmp_path):
    model = tiny.tiny_llama_classifier(3)
    LaplaceLoRA(model, Classes()).fit([tiny.batch(5)], progress=False).save(tmp_path)
    model.base_model.model.config.pad_token_id = 7
    with pytest.raises(StateError, match=r"config.pad_token_id \(0 then, 7 now\)"):
        LaplaceLoRA.load(tmp_path, model)


def roberta(kind="RobertaForCausalLM"):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.RobertaConfig(
        vocab_size=tiny.VOCAB, max_position_embeddings=64, is_decoder=True, pad_token_id=0, **sizes
    )
    return tiny.adapt(getattr(transformers, kind)(config), targets=("query", "value"))


def bart():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": tiny.VOCAB}
    config = transformers.BartConfig(
        **sizes, encoder_ffn_dim=24, decoder_ffn_dim=24, eos_token_id=2, pad_token_id=0
    )
    return tiny.adapt(transformers.BartForSequenceClassification(config), targets=("q_proj", "v_proj"))


TOKENS = {
    "of a text": (tiny.tiny_llama, ANSWERS, {"eos_token_id": 9, "bos_token_id": 8, "pad_token_id": 7}),
    "of GPT-2": (tiny.tiny_gpt2, ANSWERS, {"eos_token_id": 9, "pad_token_id": 7}),
    "ends, of a classifier": (lambda: tiny.tiny_llama_classifier(3), Classes(), {"eos_token_id": 9}),
}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_that_trainers_set(name, tmp_path):
    """TRL's trainers set eos and pad: a posterior of such a model belongs to one that is loaded afresh too."""
    make, task, changed = TOKENS[name]
    model = make()
    for key, value in changed.items():
        setattr(model.base_model.model.config, key, value)
    batch = tiny.batch(5)
    la = LaplaceLoRA(model, task).fit([batch], progress=False)
    la.save(tmp_path)
    again = LaplaceLoRA.load(tmp_path, make())
    assert torch.equal(again.predict(TEST), la.predict(TEST))


@pytest.mark.parametrize(
    ("make", "task", "key", "value"),
    [(roberta, ANSWERS, "pad_token_id", 7), (bart, Classes(), "eos_token_id", 9)],
    ids=["positions that start at the pad", "a classifier that reads eos"],
)
def test_tokens_that_logits_depend_on(make, task, key, value, tmp_path):
    model = make()
    batch = {"input_ids": torch.randint(10, 40, (3, 5)), "labels": torch.tensor([0, 1, 0])}
    batch["input_ids"][:, -1] = 2
    LaplaceLoRA(model, task).fit([batch], progress=False).save(tmp_path)
    setattr(model.base_model.model.config, key, value)
    with pytest.raises(StateError, match=key):
        LaplaceLoRA.load(tmp_path, model)


def test_layers_left_out(tmp_path):
    """Their LoRA weights and scalings are part of the model around the posterior."""
    model = tiny.tiny_llama()
    la = LaplaceLoRA(model, ANSWERS, layers="last").fit([tiny.batch(5)], progress=False)
    la.save(tmp_path)
    left = model.base_model.model.model.layers[0].self_attn.q_proj
    left.scaling["default"] *= 2
    with pytest.raises(StateError, match=r"Linear.scaling"):
        LaplaceLoRA.load(tmp_path, model)
    left.scaling["default"] /= 2
    LaplaceLoRA.load(tmp_path, model)
    with torch.no_grad():
        left.lora_B["default"].weight[0, 0] += 1e-9
    with pytest.raises(StateError, match=r"layers.0.self_attn.q_proj.lora_B.default.weight"):
        LaplaceLoRA.load(tmp_path, model)
    with pytest.raises(NotFittedError, match=r"lora_B.default.weight' changed since fit"):
        la.predict(TEST)


class Counting(nn.Module):
    """Counts its passes, and keeps a running buffer, as some models do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.passes = nn.Linear(5, 4), nn.Linear(4, 3), 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        self.seen += 1
        return self.second(torch.tanh(self.first(x)))


def test_what_a_forward_pass_counts_is_no_setting(tmp_path):
    model = tiny.adapt(Counting(), targets=("first", "second"), r=2)
    batch = {"x": torch.randn(4, 5, dtype=torch.float64)}
    la = LaplaceLoRA(model, Classes()).fit([batch], progress=False)
    expected = la.predict(batch)
    la.save(tmp_path)
    for again in (la, LaplaceLoRA.load(tmp_path, model)):
        assert [bool(torch.equal(again.predict(batch), expected)) for _ in range(3)] == [True] * 3


def test_a_weight_that_changes_during_the_fit():
    model = tiny.tiny_llama()

    def batches():
        yield tiny.batch(4)
        shift("lm_head")(model)
        yield tiny.batch(4, seed=1)

    la = LaplaceLoRA(model, ANSWERS, structure="kfac")
    with pytest.raises(NotFittedError, match=r"lm_head.weight' changed while the posterior was fitted"):
        la.fit(batches(), progress=False)


def test_another_version_of_transformers_may_name_modules_otherwise():
    model = tiny.tiny_llama()
    now = Surroundings.of(model, LaplaceLoRA(model, ANSWERS).layers)
    renamed = {kind.replace("LlamaMLP", "MLP"): values for kind, values in now.settings.items()}
    assert now.difference(now) is None
    same = Surroundings(now.tensors, now.derived, renamed, now.version)
    assert "LlamaMLP" in same.difference(now) or "LlamaMLP" in now.difference(same)
    other = Surroundings(now.tensors, now.derived, renamed, "4.0.0")
    assert now.difference(other) is other.difference(now) is None


def test_frequencies_that_a_forward_pass_makes_anew():
    """Rotary embeddings that depend on the length of the batch are recomputed, not written to."""
    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny.tiny_llama(config={"rope_parameters": parameters, "max_position_embeddings": 20})
    rotary = model.base_model.model.model.rotary_emb
    la = LaplaceLoRA(model, ANSWERS).fit([tiny.batch(5)], progress=False)
    before = rotary.inv_freq.clone()
    model(**tiny.batch(2, 40, labels=False))
    assert not torch.equal(rotary.inv_freq, before)
    assert la.predict(TEST).isfinite().all()
    rotary.original_inv_freq *= 1.1
    with pytest.raises(NotFittedError, match="original_inv_freq"):
        la.predict(TEST)


def test_looking_is_cheap():
    """No tensor is read, and every one that matters is looked at: by names, not by time."""
    model = tiny.tiny_llama(layers=4)
    layers = LaplaceLoRA(model, ANSWERS).layers
    known = Surroundings.of(model, layers)
    watch = Watch(model, layers, known)
    treated = {name for layer in layers for name in layer.parameter_names.values()}
    assert set(known.tensors) == {name for name, _ in model.named_parameters()} - treated
    assert watch.written() == []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0)
    assert {place.name for place in watch.written()} == set(known.tensors)
