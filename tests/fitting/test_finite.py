"""Batches that are not finite: named by layer and batch, or left out and counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace_lora_fast import (
    EKFAC,
    KFAC,
    Answers,
    Checkpoint,
    Diagonal,
    InvalidBatchError,
    LaplaceLoRA,
    LaplaceWarning,
    NumericalError,
    Rows,
    Tokens,
)
from laplace_lora_fast.errors import DeferredChecks
from laplace_lora_fast.fitting.finite import Screen
from tests import tiny
from tests.fitting.test_checkpoint import Killed, require_equal, stopping, tensors

ANSWERS = Answers(tiny.ANSWERS)
MARK = 47  # a token that only bad batches have
STRUCTURES = [
    Rows(),
    Rows(refit=True),
    KFAC(factors="dense"),
    KFAC(tokens="expand", factors="sketch", columns=6),
    EKFAC(factors="dense"),
    Diagonal(),
]
GOOD = [tiny.batch(3, 5, vocab=MARK, seed=index) for index in range(4)]


def marked():
    batch = tiny.batch(2, 5, vocab=MARK, seed=9)
    batch["input_ids"][0, -1] = MARK
    return batch


class Overflowing(torch.autograd.Function):
    """Identity; its gradient is not finite where the flag is set."""

    @staticmethod
    def forward(ctx, x, bad):
        ctx.bad = bad
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.where(~ctx.bad, torch.inf), None


def model(where):
    """A model that overflows at token MARK: in the embedding, or in the gradient behind block 0 only."""
    made = tiny.tiny_llama()
    inner = made.base_model.model.model
    if where == "input":
        with torch.no_grad():
            inner.embed_tokens.weight[MARK] = torch.inf
        return made
    seen = []
    inner.embed_tokens.register_forward_hook(lambda _, args, output: seen.append(args[0] == MARK))
    inner.layers[0].register_forward_hook(
        lambda _, args, output: Overflowing.apply(output, seen[-1].any(1)[:, None, None].expand(output.shape))
    )
    return made


def fit(where, batches, structure, **options):
    la = LaplaceLoRA(model(where), ANSWERS, structure=structure)
    return la.fit(batches, progress=False, **options)


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_raise_names_batch_and_layer(structure):
    batches = [*GOOD[:2], marked(), *GOOD[2:]]
    with pytest.raises(
        InvalidBatchError, match=r"batch 2 gives logits .*input of layer '[\w.]+layers\.0[\w.]+q_proj'"
    ):
        fit("input", batches, structure)
    with pytest.raises(
        NumericalError,
        match=r"in batch 2 the gradient at the output of layer '[\w.]+layers\.0[\w.]+v_proj' is not",
    ):
        fit("gradient", batches, structure)


@pytest.mark.parametrize("where", ["input", "gradient"])
@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_skip_leaves_them_out_bit_for_bit(structure, where):
    """A first batch, the last one and one between, as if they were not there."""
    expected = fit(where, GOOD, structure)
    batches = [marked(), *GOOD[:2], marked(), *GOOD[2:], marked()]
    with pytest.warns(LaplaceWarning, match="3 batches were skipped as not finite.*batch 0"):
        found = fit(where, batches, structure, non_finite="skip")
    require_equal(tensors(found), tensors(expected))
    assert found.snapshot()[0].n_skipped == 3
    assert "3 batches of the training data were not finite" in found.summary()
    assert "not finite" not in expected.summary()


def test_dora_and_tokens_are_skipped_too():
    made = tiny.tiny_llama(use_dora=True)
    with torch.no_grad():
        made.base_model.model.model.embed_tokens.weight[MARK] = torch.inf

    def fitted(batches, task=ANSWERS, model=made):
        la = LaplaceLoRA(model, task, structure=Rows())
        return la.fit(batches, progress=False, non_finite="skip").snapshot()[0].curvature.tensors()

    with pytest.warns(LaplaceWarning, match="1 batches"):
        require_equal(fitted([marked(), *GOOD]), fitted(GOOD))
    texts = [
        batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
        for batch in [*GOOD, marked()]
    ]
    with pytest.warns(LaplaceWarning, match="1 batches"):
        found = fitted(texts, Tokens(samples=2), model("input"))
    require_equal(found, fitted(texts[:-1], Tokens(samples=2), model("input")))


def test_nothing_to_skip_is_the_same_fit():
    for structure in STRUCTURES:
        require_equal(
            tensors(fit("input", GOOD, structure, non_finite="skip")), tensors(fit("input", GOOD, structure))
        )


def test_the_count_survives_files_and_kills(tmp_path):
    batches, options = (
        [marked(), *GOOD, marked()],
        {"non_finite": "skip", "checkpoint": Checkpoint(tmp_path, 0)},
    )
    with pytest.raises(Killed):
        fit("input", stopping(batches, 3), Rows(), **options)
    with pytest.warns(LaplaceWarning, match="2 batches"):
        la = fit("input", batches, Rows(), **options)
    la.save(tmp_path)
    assert LaplaceLoRA.load(tmp_path, la.model).snapshot()[0].n_skipped == 2
    require_equal(tensors(la), tensors(fit("input", GOOD, Rows())))


def test_nothing_left():
    with pytest.raises(
        InvalidBatchError, match="all 2 batches were skipped as not finite; the first is batch 0"
    ):
        fit("input", [marked(), marked()], Rows(), non_finite="skip")


def test_pads_may_be_anything():
    """Attention over nothing gives NaN there in 16 bits."""
    streams = Screen(Silent(), ["a"], skip=True)
    x = torch.ones(2, 3, 4)
    x[1, 2] = torch.nan
    mask = torch.ones(2, 3, dtype=torch.bool)
    streams.observe_input(0, x, mask.logical_and(x.isfinite().all(-1)))
    assert not streams.wrong_input()
    streams.observe_input(0, x, mask)
    assert "layer 'a'" in streams.wrong_input()


def test_large_numbers_are_finite():
    """Their sum is not."""
    streams = Screen(Silent(), ["a"], skip=False)
    streams.observe_input(0, torch.full((2, 3, 4), 3e38), None)
    assert not streams.wrong_input()


class Silent(nn.Module):
    """An accumulator to which nothing matters."""

    def observe_input(self, *_):
        pass


def test_policy():
    with pytest.raises(ValueError, match="non_finite must be one of"):
        fit("input", GOOD, Rows(), non_finite="ignore")


def test_on_a_device_the_first_batch_is_named_later():
    """No batch waits; the meta device stands for one that is not read, so the pending tensors are looked at."""
    checks = DeferredChecks()
    for index, ok in enumerate([True, False, True, False]):
        condition = torch.tensor(ok)
        first = checks._places.get((NumericalError, "batch {index}"), torch.tensor(-1))
        checks._places[NumericalError, "batch {index}"] = first.where(condition | (first >= 0), index)
    with pytest.raises(NumericalError, match="batch 1"):
        checks.settle()
