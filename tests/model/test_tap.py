"""The two streams of every layer give autograd's gradients, whatever the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace_lora_fast import Classes, LaplaceLoRA, Outputs, UnsupportedAdapterError
from laplace_lora_fast.model.lora import lora_layers
from tests import tiny
from tests.model.taps import (
    ANSWERS,
    LLAMA_ALL,
    Recorder,
    assert_same_gradients,
    autograd_gradients,
    plain_outputs,
    read,
    tapped,
    tapped_gradients,
)

ITSELF = Outputs(lambda output, _: output)
CAUSAL = {
    "llama q v": lambda: tiny.tiny_llama(),
    "llama, every linear layer": lambda: tiny.tiny_llama(targets=LLAMA_ALL),
    "llama all-linear": lambda: tiny.tiny_llama(targets="all-linear"),
    "llama mlp of the last layer": lambda: tiny.tiny_llama(targets=("up_proj",), layers_to_transform=[1]),
    "llama lm_head": lambda: tiny.tiny_llama(targets=("lm_head",)),
    "llama v and lm_head": lambda: tiny.tiny_llama(targets=("v_proj", "lm_head")),
    "llama tied": lambda: tiny.tiny_llama(
        targets=("q_proj", "lm_head"), config={"tie_word_embeddings": True}
    ),
    "llama rslora": lambda: tiny.tiny_llama(use_rslora=True, r=3, lora_alpha=5),
    "llama ranks by pattern": lambda: tiny.tiny_llama(
        rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}
    ),
    "llama lora_bias": lambda: tiny.tiny_llama(lora_bias=True),
    "llama task type": lambda: tiny.tiny_llama(task_type="CAUSAL_LM"),
    "llama eager": lambda: tiny.tiny_llama(config={"attn_implementation": "eager"}),  # softmax in fp32
    "llama dropout": lambda: tiny.tiny_llama(lora_dropout=0.5, config={"attention_dropout": 0.5}).train(),
    "llama frozen adapter": lambda: tiny.tiny_llama(inference_mode=True),
    "gpt2 c_attn": lambda: tiny.tiny_gpt2(),
    "gpt2 every Conv1D, tied lm_head": lambda: tiny.tiny_gpt2(
        targets=("c_attn", "c_proj", "c_fc", "lm_head")
    ),
}
CLASSIFIERS = {
    "llama C=2": lambda: tiny.tiny_llama_classifier(2),
    "llama C=3 score": lambda: tiny.tiny_llama_classifier(3, targets=("q_proj", "score")),
    "llama C=1": lambda: tiny.tiny_llama_classifier(1, targets=LLAMA_ALL),
    "llama score saved": lambda: tiny.tiny_llama_classifier(2, task_type="SEQ_CLS"),
    "bert C=2": lambda: tiny.tiny_bert_classifier(2),
    "bert C=3 everything": lambda: tiny.tiny_bert_classifier(
        3, targets=("query", "key", "value", "dense", "classifier")
    ),
    "bert C=1": lambda: tiny.tiny_bert_classifier(1, task_type="SEQ_CLS"),
}


@pytest.mark.parametrize("padding", ["left", "right", None])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_model_with_answers(name, padding):
    if padding == "left" and "eager" in name:
        pytest.skip("transformers' fp32 softmax of an fp64 mask gives NaN in rows of left pads")
    assert_same_gradients(CAUSAL[name](), tiny.batch(3, padding=padding), ANSWERS)


@pytest.mark.parametrize("padding", ["left", "right", None])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_sequence_classifier(name, padding):
    if padding == "left" and "bert" in name:
        pytest.skip("BERT pools the first position, which left padding turns into a pad")
    assert_same_gradients(CLASSIFIERS[name](), tiny.batch(3, padding=padding), Classes())


class OddShapes(nn.Module):
    """Layers that see tokens flattened over the batch, and with an axis of one head before or behind them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(tiny.VOCAB, 4)
        self.flat, self.head, self.behind = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask=None):
        n, length = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.flat(self.embed(input_ids).flatten(0, 1)).view(n, length, -1).tanh()
        hidden = self.behind(self.head(hidden[:, None]).tanh()[:, 0, :, None])[:, :, 0].tanh()
        return (hidden * mask[..., None]).sum(1)


@pytest.mark.parametrize("padding", ["left", "right", None])
@pytest.mark.parametrize("length", [1, 6])
def test_tokens_in_other_shapes(length, padding):
    model = tiny.adapt(OddShapes(), targets=("flat", "head", "behind"), r=2)
    assert_same_gradients(model, tiny.batch(3, length, padding=padding), ITSELF)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("length", [1, 2])
def test_shapes_in_which_axes_could_be_confused(n, length):
    batch = tiny.batch(n, length, padding=None)  # of one token attention's queries have no gradient
    assert_same_gradients(tiny.tiny_llama(targets=("v_proj", "lm_head")), batch, ANSWERS)
    encoder = tiny.tiny_bert_classifier(2, targets=("value", "dense", "classifier"))
    assert_same_gradients(encoder, batch, Classes())


def test_outputs_read_any_position_and_lora_on_lm_head_then_sees_every_token():
    task = Outputs(lambda output, _: output.logits[:, -1, :4] + output.logits[:, -2, 2:6])
    model = tiny.tiny_llama(targets=("q_proj", "lm_head"))
    layers = assert_same_gradients(model, tiny.batch(3, padding="left"), task)
    assert all(layer.features is None for layer in layers)


def test_inputs_embeds_instead_of_ids():
    model, batch = tiny.tiny_llama_classifier(2), tiny.batch(3, padding=None)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    assert_same_gradients(model, {"inputs_embeds": embeds}, Classes())


def test_one_of_several_adapters():
    model = tiny.tiny_llama()
    model.add_adapter("other", tiny.peft.LoraConfig(r=2, lora_alpha=3, target_modules=["k_proj", "v_proj"]))
    tiny.randomise(model, 2)
    default = assert_same_gradients(model, tiny.batch(3), ANSWERS)
    model.set_adapter("other")
    other = assert_same_gradients(model, tiny.batch(3), ANSWERS)
    assert {layer.name.rsplit(".")[-1] for layer in default} == {"q_proj", "v_proj"}
    assert {layer.name.rsplit(".")[-1] for layer in other} == {"k_proj", "v_proj"}
    assert {(layer.adapter, layer.weights.rank, layer.scaling) for layer in other} == {("other", 2, 1.5)}


def test_lora_beside_a_layer_whose_adapter_is_another():
    """Layers that hold an inactive adapter only are passed over."""
    model = tiny.tiny_llama(targets=("q_proj",))
    model.add_adapter("other", tiny.peft.LoraConfig(r=2, target_modules=["o_proj"]))
    layers = assert_same_gradients(model, tiny.batch(2), ANSWERS)
    assert [layer.name.rsplit(".")[-1] for layer in layers] == ["q_proj", "q_proj"]


def test_low_precision_base_with_fp32_adapter():
    model = tiny.tiny_llama(dtype=torch.bfloat16, targets=("q_proj", "v_proj", "lm_head"))
    layers = assert_same_gradients(model, tiny.batch(3), ANSWERS, rtol=1e-5)
    assert {layer.weights.A.dtype for layer in layers} == {torch.float32}
    assert model.get_base_model().lm_head.base_layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("train", [True, False])
def test_called_in_any_grad_mode(context, train):
    model = tiny.tiny_llama(lora_dropout=0.5, targets=("q_proj", "lm_head")).train(train)
    layers = lora_layers(model, ANSWERS.head(model))
    expected, _ = autograd_gradients(model, tiny.batch(3), layers, ANSWERS)
    with context():
        batch = tiny.batch(3)  # inference tensors, under inference_mode
        got, _, _ = tapped_gradients(model, batch, ANSWERS)
    for key in got:
        rows = list(tiny.ANSWERS) if key[0].endswith("lm_head") and key[1] == "B" else slice(None)
        torch.testing.assert_close(got[key], expected[key][:, rows], rtol=1e-12, atol=1e-14)


class TwoTowers(nn.Module):
    """One tower is not used, or does not even run."""

    def __init__(self, runs):
        super().__init__()
        self.used, self.idle, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.runs = runs

    def forward(self, x):
        if self.runs:
            self.idle(x)
        return self.head(self.used(x))


IDLE = {
    True: r"'base_model.model.idle': no gradient arrived, though the layer ran",
    False: r"'base_model.model.idle': the forward pass went around the layer",
}


@pytest.mark.parametrize("runs", IDLE)
def test_a_layer_without_a_part_in_the_answers_is_refused_or_left_out(runs):
    """Its posterior would be the prior; more often something hides its gradient, and the variance is too small."""
    model = tiny.adapt(TwoTowers(runs), targets=("used", "idle"), r=2)
    batch = {"x": torch.randn(5, 4, dtype=torch.float64)}
    for structure in ("kfac", "rows"):
        with pytest.raises(UnsupportedAdapterError, match=IDLE[runs]):
            LaplaceLoRA(model, Classes(), structure=structure).fit([batch], progress=False)
    la = LaplaceLoRA(model, Classes(), layers=lambda name: "idle" not in name)
    assert la.fit([batch], progress=False).predict(batch).isfinite().all()


class InPlace(nn.Module):
    """Changes its layers' outputs in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        hidden = self.first(x)
        hidden += 1
        return self.second(hidden.tanh_())


def test_in_place_change_of_a_layer_output_behind_the_layer():
    model = tiny.adapt(InPlace(), targets=("first", "second"), r=2)
    assert_same_gradients(model, {"x": torch.randn(3, 4, dtype=torch.float64)}, ITSELF)


def test_hooks_of_the_user_that_change_a_layers_output():
    """The tap sees the layer's own output, not what such a hook makes of it."""
    model = tiny.tiny_llama()
    layer = model.get_base_model().model.layers[0].self_attn.v_proj
    handles = [layer.register_forward_hook(lambda module, args, output: 3 * output)]
    assert_same_gradients(model, tiny.batch(3), ANSWERS)
    handles.append(layer.register_forward_hook(lambda module, args, output: output.mul_(2)))
    assert_same_gradients(model, tiny.batch(3), ANSWERS)
    handles.append(layer.register_forward_pre_hook(lambda module, args: (args[0] / 2,)))
    assert_same_gradients(model, tiny.batch(3), ANSWERS)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_prior_function_is_the_model_without_its_adapter(padding):
    """And the adapter is on again behind it."""
    model, batch = tiny.tiny_llama(targets=("q_proj", "lm_head")), tiny.batch(3, padding=padding)
    recorder = Recorder()
    tap, head = tapped(model, ANSWERS, recorder)
    with torch.no_grad(), model.disable_adapter():
        expected = plain_outputs(model.eval(), batch, ANSWERS)
    with tap:
        inputs = read(head, batch)
        u, calls = tap.forward(inputs), recorder.calls.copy()
        prior = tap.prior_u(inputs)
        assert recorder.calls == calls  # not observed
        again = tap.forward(inputs)
    assert not prior.requires_grad
    torch.testing.assert_close(prior, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(again, u)
    assert (u - prior).abs().max() > 1e-3
