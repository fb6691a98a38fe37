from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from torch import nn

from laplace_lora_fast import LaplaceLoRA, UnsupportedAdapterError
from laplace_lora_fast.errors import DeferredChecks
from laplace_lora_fast.heads import Head
from laplace_lora_fast.likelihoods import Link, probabilities
from laplace_lora_fast.taps import Tap, find_sites
from tests import tiny

LLAMA_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Recorder:
    """Observer that keeps what it is shown."""

    def __init__(self):
        self.inputs, self.gradients, self.calls = {}, {}, Counter()

    def observe_input(self, group, x, mask):
        self.calls["input", group] += 1
        self.inputs[group] = x, mask

    def observe_gradient(self, site, g, mask):
        self.calls["gradient", site] += 1
        self.gradients[site] = g, mask


def real(x, mask):
    return x.double() if mask is None else x.double().where(mask[..., None], 0)


def cotangent_for(logits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits)


def tapped_gradients(model, batch, **head):
    """Per-example gradients of lora_A and lora_B from the two streams, and the tap's logits."""
    recorder, wrapped = Recorder(), Head(model, **head)
    sites = find_sites(model, wrapped)
    with Tap(model, wrapped, sites, recorder) as tap:
        logits = tap.forward(wrapped.inputs(batch, torch.device("cpu"), DeferredChecks()))
        tap.backward(logits, cotangent_for(logits.detach()), last=True)
    gradients = {}
    for index, site in enumerate(sites):
        x, g = real(*recorder.inputs[tap.groups[index]]), real(*recorder.gradients[index])
        a, b = site.A.double(), site.B.double()
        gradients[site.name, "A"] = torch.einsum("ntr,nti->nri", site.scaling * g @ b, x)
        gradients[site.name, "B"] = torch.einsum("nto,ntr->nor", site.scaling * g, x @ a.mT)
    leaders = {("input", group): 1 for group in tap.groups}
    assert recorder.calls == leaders | {("gradient", index): 1 for index in range(len(sites))}
    return gradients, logits.detach(), sites


def plain_logits(model, batch, answer_token_ids=None, output_fn=None):
    """What a user's own forward pass gives."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if output_fn is not None:
        return output_fn(model(**inputs), inputs)
    if answer_token_ids is None:
        return model(**inputs).logits
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    logits = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    last = [int(row.nonzero().max()) for row in mask]
    return torch.stack([logits[n, t, list(answer_token_ids)] for n, t in enumerate(last)])


def autograd_gradients(model, batch, sites, **head):
    """Per-example gradients of the same function by autograd, one example at a time, and its logits."""
    was_training = model.training
    model.eval()
    keys = [(site.name, side) for site in sites for side in "AB"]
    weights = [model.get_parameter(site.weight_name(side)) for site in sites for side in "AB"]
    flags = [weight.requires_grad for weight in weights]
    with torch.enable_grad():
        for weight in weights:
            weight.requires_grad_(True)
        logits = plain_logits(model, batch, **head)
        objective = (logits * cotangent_for(logits.detach())).sum(1)
        rows = [torch.autograd.grad(o, weights, retain_graph=True) for o in objective]
    for weight, flag in zip(weights, flags, strict=True):
        weight.requires_grad_(flag)
    model.train(was_training)
    return {key: torch.stack(parts) for key, parts in zip(keys, zip(*rows, strict=True), strict=True)}, logits


def assert_same_gradients(model, batch, rtol=1e-12, **head):
    tapped, logits, sites = tapped_gradients(model, batch, **head)
    expected, plain = autograd_gradients(model, batch, sites, **head)
    torch.testing.assert_close(logits, plain.detach(), rtol=rtol, atol=rtol)
    rows = {(site.name, "B"): site.rows for site in sites if site.rows is not None}
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0, key
        if key in rows:
            others = torch.ones(gradient.shape[1], dtype=torch.bool).index_fill(0, rows[key], False)
            assert not gradient[:, others].any()
            gradient = gradient[:, rows[key]]
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            tapped[key].to(gradient),
            gradient,
            rtol=rtol,
            atol=rtol * scale,
            msg=lambda m, key=key: f"{key}: {m}",
        )
    return sites


ANSWERS = {"answer_token_ids": tiny.ANSWERS}
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
    assert_same_gradients(CAUSAL[name](), tiny.batch(3, padding=padding), **ANSWERS)


@pytest.mark.parametrize("padding", ["left", "right", None])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_sequence_classifier(name, padding):
    if padding == "left" and "bert" in name:
        pytest.skip("BERT pools the first position, which left padding turns into a pad")
    assert_same_gradients(CLASSIFIERS[name](), tiny.batch(3, padding=padding))


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
    assert_same_gradients(model, tiny.batch(3, length, padding=padding), output_fn=lambda out, _: out)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("length", [1, 2])
def test_shapes_in_which_axes_could_be_confused(n, length):
    batch = tiny.batch(n, length, padding=None)  # of one token attention's queries have no gradient
    assert_same_gradients(tiny.tiny_llama(targets=("v_proj", "lm_head")), batch, **ANSWERS)
    assert_same_gradients(tiny.tiny_bert_classifier(2, targets=("value", "dense", "classifier")), batch)


def test_output_fn_reads_any_position_and_lora_on_lm_head_then_sees_every_token():
    def output_fn(output, batch):
        return output.logits[:, -1, :4] + output.logits[:, -2, 2:6]

    model = tiny.tiny_llama(targets=("q_proj", "lm_head"))
    sites = assert_same_gradients(model, tiny.batch(3, padding="left"), output_fn=output_fn)
    assert all(site.rows is None for site in sites)


def test_inputs_embeds_instead_of_ids():
    model, batch = tiny.tiny_llama_classifier(2), tiny.batch(3, padding=None)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    assert_same_gradients(model, {"inputs_embeds": embeds}, output_fn=lambda out, _: out.logits)


def test_one_of_several_adapters():
    model = tiny.tiny_llama()
    model.add_adapter("other", tiny.peft.LoraConfig(r=2, lora_alpha=3, target_modules=["k_proj", "v_proj"]))
    tiny.randomise(model, 2)
    default = assert_same_gradients(model, tiny.batch(3), **ANSWERS)
    model.set_adapter("other")
    other = assert_same_gradients(model, tiny.batch(3), **ANSWERS)
    assert {s.name.rsplit(".")[-1] for s in default} == {"q_proj", "v_proj"}
    assert {s.name.rsplit(".")[-1] for s in other} == {"k_proj", "v_proj"}
    assert {(s.adapter, s.rank, s.scaling) for s in other} == {("other", 2, 1.5)}


def test_lora_beside_a_layer_whose_adapter_is_another():
    """Layers that hold an inactive adapter only are passed over."""
    model = tiny.tiny_llama(targets=("q_proj",))
    model.add_adapter("other", tiny.peft.LoraConfig(r=2, target_modules=["o_proj"]))
    sites = assert_same_gradients(model, tiny.batch(2), **ANSWERS)
    assert [s.name.rsplit(".")[-1] for s in sites] == ["q_proj", "q_proj"]


def test_low_precision_base_with_fp32_adapter():
    model = tiny.tiny_llama(dtype=torch.bfloat16, targets=("q_proj", "v_proj", "lm_head"))
    sites = assert_same_gradients(model, tiny.batch(3), rtol=1e-5, **ANSWERS)
    assert {site.A.dtype for site in sites} == {torch.float32}
    assert model.get_base_model().lm_head.base_layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("train", [True, False])
def test_called_in_any_grad_mode(context, train):
    model = tiny.tiny_llama(lora_dropout=0.5, targets=("q_proj", "lm_head")).train(train)
    sites = find_sites(model, Head(model, tiny.ANSWERS))
    expected, _ = autograd_gradients(model, tiny.batch(3), sites, **ANSWERS)
    with context():
        batch = tiny.batch(3)  # inference tensors, under inference_mode
        tapped, _, _ = tapped_gradients(model, batch, **ANSWERS)
    for key in tapped:
        rows = list(tiny.ANSWERS) if key[0].endswith("lm_head") and key[1] == "B" else slice(None)
        torch.testing.assert_close(tapped[key], expected[key][:, rows], rtol=1e-12, atol=1e-14)


def observed_state(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        {name: [len(getattr(module, hook)) for hook in hooks] for name, module in model.named_modules()},
        {
            name: list(getattr(module, "_forward_hooks_with_kwargs", ()))
            for name, module in model.named_modules()
        },
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


def mixed_mode_model(**lora):
    """Flags that no single train() or eval() call gives."""
    model = tiny.tiny_llama(targets=("q_proj", "lm_head"), **lora).train()
    model.get_base_model().model.layers[0].eval()
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


def test_model_is_left_as_it_was():
    model = mixed_mode_model()
    before, weights = observed_state(model), {k: v.clone() for k, v in model.state_dict().items()}
    tapped_gradients(model, tiny.batch(2), **ANSWERS)
    la = LaplaceLoRA(model, **ANSWERS).fit([tiny.batch(2)], progress=False)
    la.predict(tiny.batch(2))
    la.predict(tiny.batch(2), link_approx="map")
    assert observed_state(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("where", ["forward", "backward", "entering"])
def test_model_is_left_as_it_was_after_an_error(where):
    model = mixed_mode_model()
    la = LaplaceLoRA(model, **ANSWERS).fit([tiny.batch(2)], progress=False)
    before = observed_state(model)

    def fail(*args):
        raise RuntimeError("the model's own failure")

    layer = model.get_base_model().model.layers[1]
    if where == "entering":
        sites = find_sites(model, Head(model, tiny.ANSWERS))
        sites[-1].module.merge()
        with (
            pytest.raises(UnsupportedAdapterError, match=r"lm_head.*merged"),
            Tap(model, la._head, sites, Recorder()),
        ):
            pass
        sites[-1].module.unmerge()
    else:

        def hook(module, args, output):
            if where == "forward":
                fail()
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(fail)

        handle = layer.register_forward_hook(hook)
        for call in (lambda: la.fit([tiny.batch(2)], progress=False), lambda: la.predict(tiny.batch(2))):
            with pytest.raises(RuntimeError, match="own failure"):
                call()
        handle.remove()
    assert observed_state(model) == before
    assert_same_gradients(tiny.tiny_llama(), tiny.batch(2), **ANSWERS)


def groups_by_name(model, **head):
    _, _, sites = tapped_gradients(model, tiny.batch(2, padding="right"), **head)
    recorder, wrapped = Recorder(), Head(model, **head)
    with Tap(model, wrapped, sites, recorder) as tap:
        tap.forward(wrapped.inputs(tiny.batch(2), torch.device("cpu"), DeferredChecks()))
    groups = {}
    for site, group in zip(sites, tap.groups, strict=True):
        groups.setdefault(group, set()).add(".".join(site.name.split(".")[-4:]))
    return sorted(map(sorted, groups.values()))


def test_layers_fed_by_one_tensor_are_recognised():
    groups = groups_by_name(tiny.tiny_llama(targets=LLAMA_ALL, layers=2), **ANSWERS)
    expected = []
    for layer in "01":
        attention, mlp = f"layers.{layer}.self_attn.", f"layers.{layer}.mlp."
        expected += [
            [attention + name for name in ("k_proj", "q_proj", "v_proj")],
            [attention + "o_proj"],
            [mlp + "down_proj"],
            [mlp + name for name in ("gate_proj", "up_proj")],
        ]
    assert groups == sorted(expected)


def test_encoder_layers_fed_by_one_tensor_are_recognised():
    groups = groups_by_name(tiny.tiny_bert_classifier(2, targets=("query", "key", "value", "classifier")))
    assert sorted(map(len, groups)) == [1, 3, 3]


def test_modules_to_save_and_biases_are_left_alone_and_named():
    model = tiny.tiny_llama_classifier(2, task_type="SEQ_CLS", lora_bias=True)
    la = LaplaceLoRA(model)
    left = {name.removeprefix("base_model.model.") for name in la.parameters_left_alone}
    biases = {
        f"model.layers.{i}.self_attn.{p}.lora_B.default.bias" for i in "01" for p in ("q_proj", "v_proj")
    }
    assert left == biases | {"score.modules_to_save.default.weight"}
    la.fit([tiny.batch(4, classes=2)], progress=False)
    for name in la.parameters_left_alone:
        assert name in la.summary()
        break
    assert LaplaceLoRA(tiny.tiny_llama(), **ANSWERS).parameters_left_alone == []


def test_modules_to_save_are_named_for_a_model_loaded_for_inference():
    model = tiny.tiny_bert_classifier(2, task_type="SEQ_CLS")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    left = LaplaceLoRA(model).parameters_left_alone
    assert {name.rsplit(".", 1)[-1] for name in left} == {"weight", "bias"}
    assert all("classifier.modules_to_save.default" in name for name in left)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_observers_run_without_autograd_and_autocast(checkpointing):
    """Also in the backward pass, under the caller's autocast and within both kinds of checkpointing."""
    model, modes = tiny.tiny_llama(dtype=torch.float32), []

    class Probe(Recorder):
        def observe_input(self, *args):
            modes.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

        def observe_gradient(self, *args):
            modes.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    head = Head(model, tiny.ANSWERS)
    sites = find_sites(model, head)
    with torch.autocast("cpu", torch.bfloat16), Tap(model, head, sites, Probe()) as tap:
        logits = tap.forward(head.inputs(tiny.batch(4), torch.device("cpu"), DeferredChecks()))
        tap.backward(logits, torch.ones_like(logits), last=True)
    assert len(modes) == len(set(tap.groups)) + len(sites)
    assert set(modes) == {(False, False)}


def test_autocast_of_the_caller_runs_the_model_but_not_the_curvature():
    model, batch = tiny.tiny_llama(dtype=torch.float32, targets=("q_proj", "lm_head")), tiny.batch(4)
    recorder, head = Recorder(), Head(model, tiny.ANSWERS)
    sites = find_sites(model, head)
    with torch.autocast("cpu", torch.bfloat16):
        with Tap(model, head, sites, recorder) as tap:
            logits = tap.forward(head.inputs(batch, torch.device("cpu"), DeferredChecks())).detach()
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
        la = LaplaceLoRA(model, kfac="expand", **ANSWERS).fit([batch], progress=False)
        mean, _ = la.logit_distribution(batch)
        factors, mapped = la.factors, la.predict(batch, link_approx="map")
    assert logits.dtype == torch.bfloat16  # the model ran as the caller asked
    for index, site in enumerate(sites):
        x, mask = recorder.inputs[tap.groups[index]]
        rows = real(x, mask).flatten(0, 1)
        expected = rows.mT @ rows / (len(rows) if mask is None else int(mask.sum()))
        torch.testing.assert_close(factors[site.name].A.input_factor.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean, logits.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mapped, logits.float().softmax(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("link", Link)
def test_autocast_of_the_caller_does_not_reach_links(link):
    mean, root = torch.randn(5, 3), torch.randn(5, 3, 3)
    expected = probabilities(link, mean, root @ root.mT, 50, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        cov = (root.double() @ root.double().mT).float()
        got = probabilities(link, mean, cov, 50, torch.Generator().manual_seed(0))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", ["dense", "sketch"])
def test_autocast_of_the_caller_does_not_reach_what_is_left_of_a_fit(factor):
    """Factors keep a few rows back until the end, after the last pass."""
    model, loader = (
        tiny.tiny_llama(dtype=torch.float32, targets=("lm_head",)),
        [tiny.batch(12), tiny.batch(3)],
    )
    recorder, head, xs = Recorder(), Head(model, tiny.ANSWERS), []
    with torch.autocast("cpu", torch.bfloat16):
        with Tap(model, head, find_sites(model, head), recorder) as tap:
            for batch in loader:
                tap.forward(head.inputs(batch, torch.device("cpu"), DeferredChecks()))
                xs.append(recorder.inputs[0][0][:, 0])
        la = LaplaceLoRA(model, kfac="reduce", factor=factor, sketch_size=16, rank=16, **ANSWERS)
        la.fit(loader, progress=False)
    rows = torch.cat(xs).double()
    got = la.factors["base_model.model.lm_head"].A.input_factor.double()
    torch.testing.assert_close(got, rows.mT @ rows / 15, rtol=1e-5, atol=1e-5)


def test_autocast_of_the_caller_does_not_reach_samples():
    model, batch = tiny.tiny_llama(dtype=torch.float32), tiny.batch(4)
    la = LaplaceLoRA(model, structure="kfac", **ANSWERS).fit([batch], progress=False)
    expected = la.posterior.sample(2, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        sampled = la.posterior.sample(2, torch.Generator().manual_seed(0))
    for one, other in zip(sampled, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("factor", ["dense", "sketch"])
def test_a_layer_no_gradient_reaches_is_reported_and_keeps_the_prior(factor, runs):
    class TwoTowers(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            if runs:
                self.idle(x)
            return self.head(self.used(x))

    model = tiny.adapt(TwoTowers(), targets=("used", "idle"), r=2)
    la = LaplaceLoRA(model, prior_precision=3.0, factor=factor, sketch_size=2)
    with pytest.warns(UserWarning, match=r"no gradient reached \['base_model.model.idle'\]"):
        la.fit([{"x": torch.randn(5, 4, dtype=torch.float64)}], progress=False)
    for side in "AB":
        covariance = la.posterior.covariance("base_model.model.idle", side)
        torch.testing.assert_close(covariance, torch.eye(len(covariance), dtype=torch.float64) / 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean, cov = la.logit_distribution({"x": torch.randn(5, 4, dtype=torch.float64)})
    assert mean.isfinite().all()
    assert cov.isfinite().all()


def test_in_place_change_of_a_layer_output_behind_the_layer():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            hidden = self.first(x)
            hidden += 1
            return self.second(hidden.tanh_())

    model = tiny.adapt(InPlace(), targets=("first", "second"), r=2)
    batch = {"x": torch.randn(3, 4, dtype=torch.float64)}
    assert_same_gradients(model, batch, output_fn=lambda out, _: out)


def test_hooks_of_the_user_that_change_a_layers_output():
    """The tap sees the layer's own output, not what such a hook makes of it."""
    model = tiny.tiny_llama()
    layer = model.get_base_model().model.layers[0].self_attn.v_proj
    handles = [layer.register_forward_hook(lambda module, args, output: 3 * output)]
    assert_same_gradients(model, tiny.batch(3), **ANSWERS)
    handles.append(layer.register_forward_hook(lambda module, args, output: output.mul_(2)))
    assert_same_gradients(model, tiny.batch(3), **ANSWERS)
    handles.append(layer.register_forward_pre_hook(lambda module, args: (args[0] / 2,)))
    assert_same_gradients(model, tiny.batch(3), **ANSWERS)
    for handle in handles:
        handle.remove()


class Encoder(nn.Module):
    """A fused nn.TransformerEncoderLayer in evaluation mode would compute with the base weights alone."""

    def __init__(self, fail=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head, self.fail = nn.Linear(8, 3), fail

    def forward(self, x):
        if self.fail:
            raise RuntimeError("own failure")
        return self.head(self.encoder(x).mean(1))


@pytest.mark.parametrize("enabled", [True, False])
def test_fused_encoder_layers(enabled):
    torch.manual_seed(0)
    model, batch = (
        tiny.adapt(Encoder(), targets=("linear1", "linear2")).eval(),
        {"x": torch.randn(4, 5, 8).double()},
    )
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        expected = model(**batch).detach()
        torch.backends.mha.set_fastpath_enabled(enabled)
        la = LaplaceLoRA(model).fit([batch], progress=False)
        mean, _ = la.logit_distribution(batch)
        torch.testing.assert_close(mean, expected)
        torch.testing.assert_close(la.predict(batch, link_approx="map"), mean.softmax(-1))
        model.get_base_model().fail = True
        with pytest.raises(RuntimeError, match="own failure"):
            la.predict(batch)
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
