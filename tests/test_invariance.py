"""What must not matter does not: padding, batching, order, modes, kinds of batches. fp64, relative 1e-9."""

from __future__ import annotations

import pytest
import torch

import laplace_kernels as lk
from laplace_lora_fast import EKFAC, KFAC, Classes, Rows
from laplace_lora_fast.structures.blocks import factors
from tests import tiny
from tests.fits import (
    ANSWERS,
    MODELS,
    MODES,
    OTHER_STRUCTURES,
    assert_same,
    fitted,
    pooled_model,
    prepared,
    results,
)

POISONED = [*OTHER_STRUCTURES, EKFAC(tokens="expand", factors="dense")]


@pytest.mark.parametrize("structure", MODES, ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_padding(name, structure):
    build, task = MODELS[name]
    model, train, test = build(), tiny.batch(5, 6, seed=1), tiny.batch(4, 5, seed=2)
    sides = ("right",) if name == "bert" else ("left", "right")  # BERT pools the first position
    seen = []
    for padding in sides:
        for extra in (0, 3):
            batches = [
                prepared(name, tiny.repad(b, padding, b["input_ids"].shape[1] + extra)) for b in (train, test)
            ]
            seen.append(results(fitted(model, task, batches[:1], structure), batches[1]))
    for other in seen[1:]:
        assert_same(other, seen[0])


@pytest.mark.parametrize("structure", [*MODES, *OTHER_STRUCTURES], ids=repr)
def test_no_mask_is_a_mask_of_ones_and_unpadded_examples_are_padded_ones(structure):
    """Examples of one length at a time, without a mask, against all in one padded batch."""
    model, train = tiny.tiny_llama(), tiny.batch(6, 6, seed=1)
    alone = [
        {"input_ids": ids[mask.bool()][None], "labels": label[None]}
        for ids, mask, label in zip(train["input_ids"], train["attention_mask"], train["labels"], strict=True)
    ]
    test = tiny.batch(3, 5, seed=2, padding=None)
    masked = {**test, "attention_mask": torch.ones_like(test["input_ids"])}
    assert_same(
        results(fitted(model, ANSWERS, alone, structure), test),
        results(fitted(model, ANSWERS, [train], structure), masked),
        rtol=1e-8,
    )


@pytest.mark.parametrize("structure", MODES, ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_batch_size_and_order(name, structure):
    build, task = MODELS[name]
    model, padding = build(), "right" if name == "bert" else "left"
    train, test = (prepared(name, tiny.batch(n, 5, seed=n, padding=padding)) for n in (10, 4))
    expected = results(fitted(model, task, [train], structure), test)
    order = torch.randperm(10)
    shuffled = {k: v[order] for k, v in train.items()}
    for loader in (
        tiny.split(train, 1),
        tiny.split(train, 3),
        tiny.split(train, 8)[::-1],
        tiny.split(shuffled, 3),
    ):
        assert_same(results(fitted(model, task, loader, structure), test), expected)


@pytest.mark.parametrize("structure", [KFAC(), Rows(), Rows(refit=True)], ids=repr)
def test_predictions_do_not_depend_on_batch_size(structure):
    la = fitted(tiny.tiny_llama(), ANSWERS, [tiny.batch(5, seed=1)], structure)
    test = tiny.batch(7, seed=2)
    for link in ("probit", "mc", "bridge", "map"):
        whole = la.predict(test, link_approx=link)
        for size in (1, 3, 8):
            parts = la.predictions(tiny.split(test, size), link_approx=link, progress=False)
            torch.testing.assert_close(parts.probs, whole, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(parts.labels, test["labels"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("structure", OTHER_STRUCTURES, ids=repr)
def test_other_structures_see_no_padding_batching_order_or_checkpointing(structure, name):
    """The sketch of the rows, too: it is drawn before the data."""
    build, task = MODELS[name]
    sides = ("right", "right") if name == "bert" else ("left", "right")
    train, test = (tiny.batch(7, 5, seed=s, padding="right") for s in (1, 2))
    expected = results(fitted(build(), task, [prepared(name, train)], structure), prepared(name, test))
    padded, order = tiny.repad(train, sides[0], 8), torch.randperm(7)
    shuffled = {k: v[order] for k, v in padded.items()}
    loader = [prepared(name, batch) for batch in tiny.split(shuffled, 3)]
    wider = prepared(name, tiny.repad(test, sides[1], 9))
    got = results(fitted(build().train(), task, loader, structure), wider)
    assert_same(got, expected, rtol=1e-8)
    model = build().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert_same(results(fitted(model, task, loader[::-1], structure), wider), expected, rtol=1e-8)


# What padded rows hold


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("structure", MODES, ids=repr)
@pytest.mark.parametrize("filler", [torch.nan, torch.inf])
def test_what_padded_rows_hold(filler, structure, classes):
    train = tiny.batch(6, classes=classes, seed=1, padding="right")
    test = tiny.batch(4, classes=classes, seed=2)
    clean = results(fitted(pooled_model(classes), Classes(), [train], structure), test)
    poisoned = pooled_model(classes, filler)
    got = results(fitted(poisoned, Classes(), tiny.split(train, 4), structure), test)
    assert_same(got, clean)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("structure", POISONED, ids=repr)
def test_what_padded_rows_hold_in_other_structures(structure, classes):
    train = tiny.batch(6, classes=classes, seed=1, padding="right")
    test = tiny.batch(4, classes=classes, seed=2)
    clean = results(fitted(pooled_model(classes), Classes(), [train], structure), test)
    poisoned = pooled_model(classes, torch.nan)
    got = results(fitted(poisoned, Classes(), tiny.split(train, 4), structure), test)
    assert_same(got, clean)


@pytest.mark.parametrize("tokens", ["expand", "reduce"])
def test_what_padded_rows_hold_in_sketches(tokens):
    train, test = tiny.batch(6, seed=1, padding="right"), tiny.batch(4, seed=2)
    structure = KFAC(tokens=tokens, factors="sketch", columns=3, rank=2)
    covs = []
    for filler in (0.0, torch.nan):
        la = fitted(pooled_model(3, filler), Classes(), tiny.split(train, 4), structure)
        covs.append(la.logit_distribution(test)[1])
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
@pytest.mark.parametrize("tokens", ["expand", "paper", "reduce"])
def test_what_waits_for_the_batches_that_follow(tokens, segment, request):
    """Batches of few tokens, added to the factors as they come or gathered and added together."""
    train, test = tiny.batch(14, 5, seed=1, padding="right"), tiny.batch(4, 5, seed=2)
    filler = 0.0 if tokens == "paper" else torch.nan  # the paper's code counts pads
    loaders = [tiny.split(train, 2), tiny.split(train, 3)[::-1]]
    structure = KFAC(tokens=tokens, factors="dense")
    expected = results(fitted(pooled_model(3, width=64), Classes(), loaders[0], structure), test)
    sizes = request.getfixturevalue("grouped")
    for loader in loaders:
        model = pooled_model(3, filler, segment, width=64)
        assert_same(results(fitted(model, Classes(), loader, structure), test), expected)
    assert tokens == "reduce" or max(sizes) > 2  # factors of one width fill up together


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


# Modes and kinds of batches


@pytest.mark.parametrize("name", MODELS)
def test_train_mode_and_no_grad(name):
    build, task = MODELS[name]
    train, test = tiny.batch(6, seed=1, padding="right"), tiny.batch(4, seed=2, padding="right")
    expected = results(fitted(build().eval(), task, [train]), test)
    assert_same(results(fitted(build().train(), task, [train]), test), expected, rtol=1e-14)
    model = build()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            got = results(fitted(model, task, tiny.split(train, 9)), test)
        assert_same(got, expected, rtol=1e-14)


def test_other_columns_of_a_batch_reach_the_model_and_not_the_fit():
    """Token types change BERT's output; a fit with them given as zeros is the one without."""
    model = tiny.tiny_bert_classifier(3)
    train, test = tiny.batch(5, padding="right"), tiny.batch(3, padding="right")
    zeros = {**train, "token_type_ids": torch.zeros_like(train["input_ids"])}
    ones = {**train, "token_type_ids": torch.ones_like(train["input_ids"])}
    expected = results(fitted(model, Classes(), [train]), test)
    assert_same(results(fitted(model, Classes(), [zeros]), test), expected)
    other = results(fitted(model, Classes(), [ones]), test)
    assert (other["covariance"] - expected["covariance"]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [dict, "BatchEncoding", "label"])
def test_kinds_of_batches(kind):
    model, train, test = tiny.tiny_llama_classifier(3), tiny.batch(5), tiny.batch(3)
    batch = dict(train)
    if kind == "BatchEncoding":
        batch = tiny.transformers.BatchEncoding(batch)
    elif kind == "label":
        batch["label"] = batch.pop("labels")
    expected = results(fitted(model, Classes(), [train]), test)
    assert_same(results(fitted(model, Classes(), [batch]), test), expected)


def test_a_generator_serves_as_loader():
    model, train, test = tiny.tiny_llama(), tiny.batch(6), tiny.batch(3)
    la = fitted(model, ANSWERS, (b for b in tiny.split(train, 2)))
    assert_same(results(la, test), results(fitted(model, ANSWERS, [train]), test))
    predictions = la.predictions((b for b in tiny.split(test, 2)), progress=False)
    torch.testing.assert_close(predictions.probs, la.predict(test))
