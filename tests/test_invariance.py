"""What must not matter does not: padding, batching, order, checkpointing, modes. fp64, relative 1e-9."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import laplace_kernels as lk
from laplace_lora_fast import LaplaceLoRA, UnsupportedAdapterError, factors
from tests import tiny

MODES = [(kfac, fisher) for kfac in ("expand", "reduce") for fisher in ("exact", "empirical")]
OTHER_STRUCTURES = ["ekfac", "diag", "dual"]
DTYPE = torch.float64


def results(la, batch):
    """Everything a user can see of a fit, by name; nothing in it depends on an eigenvector's sign."""
    out = {"evidence": la.log_marginal_likelihood()}
    for name, layer in la.factors.items() if la.options.structure == "kfac" else ():
        for side, weight in (("A", layer.A), ("B", layer.B)):
            out[f"{name} {side} input"] = weight.input_factor
            out[f"{name} {side} gradient"] = weight.gradient_factor
    out["mean"], out["covariance"] = la.logit_distribution(batch)
    out["probabilities"] = la.predict(batch)
    return out


def assert_same(got, expected, rtol=1e-9):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        scale = float(value.abs().max())
        assert scale > 0, key
        torch.testing.assert_close(
            got[key], value, rtol=0, atol=rtol * scale, msg=lambda m, key=key: f"{key}: {m}"
        )


def fitted(model, loader, kfac="reduce", fisher="exact", **kwargs):
    factors = {} if kwargs.get("structure") in ("dual", "diag") else {"factor": "dense", "kfac": kfac}
    la = LaplaceLoRA(model, fisher=fisher, prior_precision=0.7, **factors, **kwargs)
    return la.fit(loader, progress=False)


def with_positions(batch):
    """Classifiers are not told where their padding is: absolute positions, and rotary ones rounded to fp32, shift."""
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


ANSWERS = {"answer_token_ids": tiny.ANSWERS}
MODELS = {
    "llama": (lambda: tiny.tiny_llama(targets=("q_proj", "v_proj", "lm_head")), ANSWERS),
    "llama classifier": (lambda: tiny.tiny_llama_classifier(3, targets=("v_proj", "score")), {}),
    "gpt2": (lambda: tiny.tiny_gpt2(targets=("c_attn", "c_proj")), ANSWERS),
    "bert": (lambda: tiny.tiny_bert_classifier(3, targets=("query", "dense", "classifier")), {}),
}


def prepared(name, batch):
    return with_positions(batch) if name == "llama classifier" else batch


@pytest.mark.parametrize(("kfac", "fisher"), MODES)
@pytest.mark.parametrize("name", MODELS)
def test_padding(name, kfac, fisher):
    build, head = MODELS[name]
    model, train, test = build(), tiny.batch(5, 6, seed=1), tiny.batch(4, 5, seed=2)
    sides = ("right",) if name == "bert" else ("left", "right")  # BERT pools the first position
    seen = []
    for padding in sides:
        for extra in (0, 3):
            batches = [
                prepared(name, tiny.repad(b, padding, b["input_ids"].shape[1] + extra)) for b in (train, test)
            ]
            seen.append(results(fitted(model, batches[:1], kfac, fisher, **head), batches[1]))
    for other in seen[1:]:
        assert_same(other, seen[0])


@pytest.mark.parametrize(("kfac", "fisher"), MODES)
def test_no_mask_is_a_mask_of_ones_and_unpadded_examples_are_padded_ones(kfac, fisher):
    """Examples of one length at a time, without a mask, against all in one padded batch."""
    model, train = tiny.tiny_llama(), tiny.batch(6, 6, seed=1)
    alone = [
        {"input_ids": ids[mask.bool()][None], "labels": label[None]}
        for ids, mask, label in zip(train["input_ids"], train["attention_mask"], train["labels"], strict=True)
    ]
    test = tiny.batch(3, 5, seed=2, padding=None)
    masked = {**test, "attention_mask": torch.ones_like(test["input_ids"])}
    assert_same(
        results(fitted(model, alone, kfac, fisher, **ANSWERS), test),
        results(fitted(model, [train], kfac, fisher, **ANSWERS), masked),
    )


@pytest.mark.parametrize(("kfac", "fisher"), MODES)
@pytest.mark.parametrize("name", MODELS)
def test_batch_size_and_order(name, kfac, fisher):
    build, head = MODELS[name]
    padding = "right" if name == "bert" else "left"
    model, train, test = (
        build(),
        tiny.batch(10, 5, seed=1, padding=padding),
        tiny.batch(4, 5, seed=2, padding=padding),
    )
    train, test = prepared(name, train), prepared(name, test)
    expected = results(fitted(model, [train], kfac, fisher, **head), test)
    order = torch.randperm(10)
    shuffled = {k: v[order] for k, v in train.items()}
    for loader in (
        tiny.split(train, 1),
        tiny.split(train, 3),
        tiny.split(train, 8)[::-1],
        tiny.split(shuffled, 3),
    ):
        assert_same(results(fitted(model, loader, kfac, fisher, **head), test), expected)


def test_predictions_do_not_depend_on_batch_size():
    la = fitted(tiny.tiny_llama(), [tiny.batch(5, seed=1)], **ANSWERS)
    test = tiny.batch(7, seed=2)
    for link in ("probit", "mc", "bridge", "map"):
        whole = la.predict(test, link_approx=link)
        for size in (1, 3, 8):
            parts, labels = la.predict_loader(tiny.split(test, size), link_approx=link, progress=False)
            torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(labels, test["labels"])


class Pooled(nn.Module):
    """Mean of token features, with `filler` in every padded row of the hidden states, forward and backward."""

    def __init__(self, classes, filler, segment=None, width=8):
        super().__init__()
        torch.manual_seed(0)
        ends = 3 * width // 4
        self.embed, self.first = nn.Embedding(tiny.VOCAB, ends), nn.Linear(ends, width)
        self.second, self.third = nn.Linear(width, width), nn.Linear(width, ends)
        self.head = nn.Linear(ends, classes)
        self.filler, self.segment, self.calls = filler, segment, 0

    def forward(self, input_ids, attention_mask):
        real = attention_mask.bool()[..., None]
        hidden = self.first(torch.where(real, self.embed(input_ids), self.filler))
        middle = self.middle if self.segment is None else lambda h: checkpoint(self.middle, h, **self.segment)
        hidden = middle(hidden)
        return self.head(torch.where(real, hidden, 0).sum(1) / real.sum(1))

    def middle(self, hidden):
        self.calls += 1
        return self.third(torch.tanh(self.second(torch.tanh(hidden)))).sin()


def pooled_model(classes, filler=0.0, segment=None, targets=("first", "second", "third", "head"), width=8):
    return tiny.adapt(Pooled(classes, filler, segment, width), targets=targets, r=2)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("kfac", "fisher"), MODES)
@pytest.mark.parametrize("filler", [torch.nan, torch.inf])
def test_what_padded_rows_hold(filler, kfac, fisher, classes):
    train = tiny.batch(6, classes=classes, seed=1, padding="right")
    test = tiny.batch(4, classes=classes, seed=2)
    clean = results(fitted(pooled_model(classes), [train], kfac, fisher), test)
    poisoned = pooled_model(classes, filler)
    assert_same(results(fitted(poisoned, tiny.split(train, 4), kfac, fisher), test), clean)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("structure", OTHER_STRUCTURES)
def test_what_padded_rows_hold_in_other_structures(structure, classes):
    train = tiny.batch(6, classes=classes, seed=1, padding="right")
    test = tiny.batch(4, classes=classes, seed=2)
    clean = results(fitted(pooled_model(classes), [train], structure=structure), test)
    poisoned = pooled_model(classes, torch.nan)
    assert_same(results(fitted(poisoned, tiny.split(train, 4), structure=structure), test), clean)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("structure", OTHER_STRUCTURES)
def test_other_structures_see_no_padding_batching_order_or_checkpointing(structure, name):
    """The sketch of the rows, too: it is drawn before the data."""
    build, head = MODELS[name]
    sides = ("right", "right") if name == "bert" else ("left", "right")
    train, test = (tiny.batch(7, 5, seed=s, padding="right") for s in (1, 2))
    settings = {"structure": structure, "row_sketch_size": 5, **head}
    expected = results(fitted(build(), [prepared(name, train)], **settings), prepared(name, test))
    padded, order = tiny.repad(train, sides[0], 8), torch.randperm(7)
    shuffled = {k: v[order] for k, v in padded.items()}
    loader = [prepared(name, batch) for batch in tiny.split(shuffled, 3)]
    wider = prepared(name, tiny.repad(test, sides[1], 9))
    assert_same(results(fitted(build().train(), loader, **settings), wider), expected, rtol=1e-8)
    model = build().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert_same(results(fitted(model, loader[::-1], **settings), wider), expected, rtol=1e-8)


@pytest.mark.parametrize("kfac", ["expand", "reduce"])
def test_what_padded_rows_hold_in_sketches(kfac):
    train, test = tiny.batch(6, seed=1, padding="right"), tiny.batch(4, seed=2)
    covs = []
    for filler in (0.0, torch.nan):
        la = LaplaceLoRA(pooled_model(3, filler), factor="sketch", sketch_size=3, rank=2, kfac=kfac)
        covs.append(la.fit(tiny.split(train, 4), progress=False).logit_distribution(test)[1])
    torch.testing.assert_close(covs[1], covs[0], rtol=1e-9, atol=1e-12)


@pytest.fixture
def grouped(monkeypatch):
    """Tokens wait for each other as they do for a GPU; the sizes of the groups they are then added in."""
    sizes, gram_group_ = [], lk.gram_group_

    def recorded(Cs, Xs):
        sizes.append(len(Cs))
        gram_group_(Cs, Xs)

    monkeypatch.setattr(factors, "tokens_worth_an_update", lambda device: 1000)
    monkeypatch.setattr(lk, "gram_group_", recorded)
    return sizes


@pytest.mark.parametrize("segment", [None, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
@pytest.mark.parametrize("kfac", ["expand", "paper", "reduce"])
def test_what_waits_for_the_batches_that_follow(kfac, segment, request):
    """Batches of few tokens, added to the factors as they come or gathered and added together."""
    train, test = tiny.batch(14, 5, seed=1, padding="right"), tiny.batch(4, 5, seed=2)
    filler = 0.0 if kfac == "paper" else torch.nan  # the paper's code counts pads
    loaders = [tiny.split(train, 2), tiny.split(train, 3)[::-1]]
    width = {"width": 64}
    expected = results(fitted(pooled_model(3, **width), loaders[0], kfac), test)
    sizes = request.getfixturevalue("grouped")
    for loader in loaders:
        assert_same(results(fitted(pooled_model(3, filler, segment, **width), loader, kfac), test), expected)
    assert kfac == "reduce" or max(sizes) > 2  # factors of one width fill up together


def test_padded_rows_of_the_poisoned_model_are_not_finite():
    """The tests above would prove nothing otherwise."""
    model, batch = pooled_model(2, torch.nan).eval(), tiny.batch(6, padding="right", labels=False)
    seen = {}

    def keep(module, args, output):
        seen["x"] = args[0].detach()
        output.register_hook(lambda g: seen.__setitem__("g", g))

    model.get_base_model().first.register_forward_hook(keep)
    model(**batch).sum().backward()
    pads = batch["attention_mask"] == 0
    assert pads.any()
    for stream in seen.values():
        assert stream[pads].isnan().all()
        assert stream[~pads].isfinite().all()


def count_calls(module):
    calls = []
    module.register_forward_pre_hook(lambda *a: calls.append(torch.is_grad_enabled()))
    return calls


CHECKPOINTED = {
    "llama": (lambda **k: tiny.tiny_llama(targets=("q_proj", "v_proj", "down_proj"), **k), ANSWERS, "mlp"),
    "llama classifier": (lambda **k: tiny.tiny_llama_classifier(3, **k), {}, "mlp"),
    "gpt2": (lambda **k: tiny.tiny_gpt2(**k), ANSWERS, "mlp"),
    "bert": (lambda **k: tiny.tiny_bert_classifier(3, **k), {}, "intermediate"),
}


@pytest.mark.parametrize("input_grads", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing(name, reentrant, input_grads):
    build, head, part = CHECKPOINTED[name]
    train, test = tiny.batch(6, seed=1, padding="right"), tiny.batch(4, seed=2, padding="right")
    expected = {
        mode: results(fitted(build(), tiny.split(train, 4), mode, **head), test)
        for mode in ("expand", "reduce")
    }
    model = build().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if input_grads:
        model.enable_input_require_grads()
    inner = [m for n, m in model.named_modules() if n.endswith("." + part)]
    calls = [count_calls(module) for module in inner]
    for mode, value in expected.items():
        for seen in calls:
            seen.clear()
        la = fitted(model, tiny.split(train, 4), mode, **head)
        checks = 1 + (2 if head else 0)  # one for the rows of the first batch, two for where positions start
        for seen in calls:  # two batches, each one forward and two backward passes that run the forward again
            assert len(seen) == 2 * (1 + 2) + checks
        assert_same(results(la, test), value)


def test_gradient_checkpointing_of_a_model_with_dropout():
    """The checkpointed layers run in training mode, what is inside them does not."""
    train, test = tiny.batch(6, seed=1), tiny.batch(4, seed=2)
    rates = {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
    la = fitted(tiny.tiny_gpt2(lora_dropout=0.5, config=rates), [train], **ANSWERS)
    model = tiny.tiny_gpt2(lora_dropout=0.5, config=rates).train()
    model.gradient_checkpointing_enable()
    assert_same(results(fitted(model, [train], **ANSWERS), test), results(la, test))


@pytest.mark.parametrize(("kfac", "fisher"), MODES)
@pytest.mark.parametrize("segment", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_checkpointing_in_custom_code(segment, kfac, fisher):
    train, test = tiny.batch(6, seed=1), tiny.batch(4, seed=2)
    expected = results(fitted(pooled_model(3), tiny.split(train, 4), kfac, fisher), test)
    model = pooled_model(3, segment=segment)
    la = fitted(model, tiny.split(train, 4), kfac, fisher)
    assert model.get_base_model().calls == 2 * (1 + (2 if fisher == "exact" else 1)) + 1
    assert_same(results(la, test), expected)


def test_reentrant_checkpointing_in_custom_code_whose_input_needs_no_gradient():
    """Its backward pass cannot reach a layer inside, in training neither; that is said."""
    batch, segment = tiny.batch(6, seed=1), {"use_reentrant": True}
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad"),
        pytest.raises(UnsupportedAdapterError, match="use_reentrant"),
    ):
        fitted(pooled_model(3, segment=segment, targets=("second",)), [batch])
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad"),
        pytest.warns(UserWarning, match=r"no gradient reached \['base_model.model.second'\]"),
    ):
        fitted(pooled_model(3, segment=segment, targets=("second", "head")), [batch])


@pytest.mark.parametrize("name", MODELS)
def test_train_mode_and_no_grad(name):
    build, head = MODELS[name]
    train, test = tiny.batch(6, seed=1, padding="right"), tiny.batch(4, seed=2, padding="right")
    expected = results(fitted(build().eval(), [train], **head), test)
    assert_same(results(fitted(build().train(), [train], **head), test), expected, rtol=1e-14)
    model = build()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            got = results(fitted(model, tiny.split(train, 9), **head), test)
        assert_same(got, expected, rtol=1e-14)


def test_other_columns_of_a_batch_reach_the_model_and_not_the_fit():
    """Token types change BERT's output; a fit with them given as zeros is the one without."""
    model, train, test = (
        tiny.tiny_bert_classifier(3),
        tiny.batch(5, padding="right"),
        tiny.batch(3, padding="right"),
    )
    zeros = {**train, "token_type_ids": torch.zeros_like(train["input_ids"])}
    ones = {**train, "token_type_ids": torch.ones_like(train["input_ids"])}
    expected = results(fitted(model, [train]), test)
    assert_same(results(fitted(model, [zeros]), test), expected)
    assert (results(fitted(model, [ones]), test)["covariance"] - expected["covariance"]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [dict, "BatchEncoding", "label"])
def test_kinds_of_batches(kind):
    model, train, test = tiny.tiny_llama_classifier(3), tiny.batch(5), tiny.batch(3)
    batch = dict(train)
    if kind == "BatchEncoding":
        batch = tiny.transformers.BatchEncoding(batch)
    elif kind == "label":
        batch["label"] = batch.pop("labels")
    assert_same(results(fitted(model, [batch]), test), results(fitted(model, [train]), test))


def test_a_generator_serves_as_loader():
    model, train, test = tiny.tiny_llama(), tiny.batch(6), tiny.batch(3)
    la = fitted(model, (b for b in tiny.split(train, 2)), **ANSWERS)
    assert_same(results(la, test), results(fitted(model, [train], **ANSWERS), test))
    probs, _ = la.predict_loader((b for b in tiny.split(test, 2)), progress=False)
    torch.testing.assert_close(probs, la.predict(test))
