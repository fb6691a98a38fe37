"""Options of several tokens, ragged, against autograd one sequence at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor, nn

from laplace_lora_fast import (
    KFAC,
    Answers,
    DirectPreference,
    HeldOut,
    InvalidBatchError,
    LaplaceLoRA,
    LaplaceWarning,
    LeaveOneOut,
    Options,
    Preference,
    Rows,
)
from laplace_lora_fast.data import option_batches_from_ids, preference_batches
from laplace_lora_fast.model import tap
from tests import tiny
from tests.oracle import assert_close

EXACT = Rows(columns=1 << 20)
WIDE = LeaveOneOut(grid=(1e-2, 0.1, 1.0, 10.0, 1e2))
Example = tuple[list[int], list[list[int]], int]


def examples(n: int, seed: int = 0, one_token: bool = False) -> list[Example]:
    """Prompts of 2 to 5 tokens with 2 to 4 options of 1 to 3 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    drawn = []
    for _ in range(n):
        options = draw(2, 5)
        texts = [[draw(1, 48) for _ in range(1 if one_token else draw(1, 4))] for _ in range(options)]
        drawn.append(([draw(1, 48) for _ in range(draw(2, 6))], texts, draw(0, options)))
    return drawn


def scores(model: nn.Module, example: Example, mean: bool = False) -> Tensor:
    prompt, options, _ = example
    found = []
    for option in options:
        log_probs = model(input_ids=torch.tensor([[*prompt, *option]])).logits[0].log_softmax(-1)
        each = torch.stack([log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(option)])
        found.append(each.mean() if mean else each.sum())
    return torch.stack(found)


def contrasts(model: nn.Module, example: Example, mean: bool) -> tuple[Tensor, Tensor]:
    weights = [p for name, p in model.named_parameters() if "lora_" in name]
    u = scores(model, example, mean)
    f = u[1:] - u[0]
    grads = [torch.autograd.grad(each, weights, retain_graph=True, allow_unused=True) for each in f]
    rows = [
        torch.cat(
            [(torch.zeros_like(w) if g is None else g).flatten() for g, w in zip(each, weights, strict=True)]
        )
        for each in grads
    ]
    return f.detach(), torch.stack(rows)


def trainable(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model.eval()


class Dense:
    """The exact posterior over all LoRA weights at a prior precision."""

    def __init__(self, model: nn.Module, train: Sequence[Example], prior: float, mean: bool) -> None:
        self.model, self.mean = model, mean
        norm = sum(p.detach().square().sum() for n, p in model.named_parameters() if "lora_" in n)
        rows = [contrasts(model, example, mean) for example in train]
        hessian = prior * torch.eye(rows[0][1].shape[1], dtype=torch.float64)
        fit = 0.0
        for (f, J), (_, _, label) in zip(rows, train, strict=True):
            p = torch.cat([f.new_zeros(1), f]).softmax(0)
            fit += p[label].log()
            hessian += J.mT @ (torch.diag(p) - torch.outer(p, p))[1:, 1:] @ J
        size = len(hessian)
        self.evidence = fit - 0.5 * (prior * norm + hessian.logdet() - size * math.log(prior))
        self.covariance = torch.linalg.inv(hessian)

    def probabilities(self, example: Example) -> Tensor:
        f, J = contrasts(self.model, example, self.mean)
        cov = nn.functional.pad(J @ self.covariance @ J.mT, (1, 0, 1, 0))
        f = torch.cat([f.new_zeros(1), f])
        pairwise = cov.diagonal()[:, None] + cov.diagonal() - 2 * cov
        z = (f[:, None] - f) / (1 + math.pi / 8 * pairwise).sqrt()
        return (-torch.logsumexp(-z, 1)).softmax(0)


def in_order(batches: Sequence[tiny.Batch], found: Tensor, wanted: Sequence[Example]) -> list[Tensor]:
    """Rows of `found`, which are in the batches' order, in that of the examples."""
    keys = []
    for batch in batches:
        for index in range(len(batch["labels"])):
            row = int((batch["group"] == index).nonzero()[0])
            keys.append(tuple(batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()))
    places = [keys.index((*prompt, *options[0])) for prompt, options, _ in wanted]
    return [found[place] for place in places]


@pytest.mark.parametrize("score", ["sum", "mean"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("v_proj", "lm_head")])
def test_against_the_dense_posterior(score: str, targets: tuple[str, ...]) -> None:
    model, train, test = trainable(tiny.tiny_llama(targets=targets)), examples(5), examples(4, 1)
    la = LaplaceLoRA(model, Options(score=score), structure=EXACT, prior_precision=0.7)
    la.fit(option_batches_from_ids(train, 2), progress=False)
    dense = Dense(model, train, 0.7, score == "mean")
    assert_close(la.log_marginal_likelihood(), dense.evidence, 1e-9)
    batches = option_batches_from_ids(test, 3)
    predictions = la.predictions(batches, progress=False)
    for example, found in zip(test, in_order(batches, predictions.probs, test), strict=True):
        expected = dense.probabilities(example)
        assert_close(found[: len(expected)], expected, 1e-9)
        assert not found[len(expected) :].any()


def test_rows_of_ragged_options_and_the_covariance_of_all_scores() -> None:
    """With a prior that data cannot move the covariance is that of the rows, J J^T / lambda."""
    model, train, test, prior = trainable(tiny.tiny_llama()), examples(5), examples(4, 1), 0.7
    weights = [p for name, p in model.named_parameters() if "lora_" in name]
    la = LaplaceLoRA(model, Options(), structure=EXACT, prior_precision=prior)
    la.fit(option_batches_from_ids(train, 2), progress=False)
    dense = Dense(model, train, prior, mean=False)
    for example in test:
        u = scores(model, example)
        J = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(each, weights, retain_graph=True)])
                for each in u
            ]
        )
        (batch,) = option_batches_from_ids([example], 1)
        assert_close(la.reward(batch, prior_precision=1e15).covariance[0] * 1e15, J @ J.mT, 1e-12)
        assert_close(la.reward(batch).covariance[0], J @ dense.covariance @ J.mT, 1e-10)
        assert_close(la.reward(batch).mean[0], u.detach(), 1e-12)


def test_one_backward_pass_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_llama()
    la = LaplaceLoRA(model, Options())
    (batch,) = option_batches_from_ids(examples(6), 6)
    la.fit([batch], progress=False)
    counted = mock.Mock(wraps=tap.send_back)
    monkeypatch.setattr(tap, "send_back", counted)
    la.predict(batch)
    assert counted.call_count == 1


def test_options_of_one_token_are_answers() -> None:
    model = tiny.tiny_llama()
    data = tiny.batch(6, length=5, seed=3, padding=None)
    listed = [
        (ids.tolist(), [[t] for t in tiny.ANSWERS], int(y))
        for ids, y in zip(data["input_ids"], data["labels"], strict=True)
    ]
    for structure in (Rows(columns=64), Rows(columns=64, refit=True)):
        answers = LaplaceLoRA(model, Answers(tiny.ANSWERS), structure=structure).fit([data], progress=False)
        options = LaplaceLoRA(model, Options(), structure=structure)
        options.fit(option_batches_from_ids(listed, 6), progress=False)
        assert_close(options.log_marginal_likelihood(), answers.log_marginal_likelihood(), 1e-10)
        assert_close(options.predict(option_batches_from_ids(listed, 6)[0]), answers.predict(data), 1e-10)
    ones = torch.ones(8, dtype=torch.float64)
    expected, found = (la.posterior.curvature.leave_one_out(ones) for la in (answers, options))
    assert_close(found[0][1], expected[0][1], 1e-10)
    assert_close(found[0][2], expected[0][2], 1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LaplaceWarning)  # of the grid's edge
        best = [la.optimize_prior_precision(WIDE, progress=False) for la in (answers, options)]
    assert best[0] == best[1]


def test_preferences_of_two_are_options_of_two() -> None:
    """With a reward of log p, as against a reference that finds everything equally likely."""
    model = tiny.tiny_llama()
    pairs = [(prompt, options[:2], min(label, 1)) for prompt, options, label in examples(5)]
    (batch,) = option_batches_from_ids(pairs, 5)
    by_reward = batch | {"reference": torch.zeros(len(batch["group"]), dtype=torch.float64)}
    options = LaplaceLoRA(model, Options(), structure=EXACT).fit([batch], progress=False)
    preferences = LaplaceLoRA(model, DirectPreference(beta=1.0), structure=EXACT)
    preferences.fit([by_reward], progress=False)
    assert_close(preferences.predict(by_reward), options.predict(batch), 1e-10)
    assert_close(preferences.log_marginal_likelihood(), options.log_marginal_likelihood(), 1e-10)


@pytest.mark.parametrize("structure", [EXACT, Rows(refit=True), KFAC()], ids=["rows", "refit", "kfac"])
def test_how_they_are_batched_and_padded_does_not_matter(structure: object) -> None:
    train, test = examples(6), examples(3, 1)
    results = []
    for size in (2, 6):
        la = LaplaceLoRA(tiny.tiny_llama(), Options(), structure=structure)
        la.fit(option_batches_from_ids(train, size), progress=False)
        batches = option_batches_from_ids(test, size)
        results.append(in_order(batches, la.predictions(batches, progress=False).probs, test))
    for one, other in zip(*results, strict=True):
        assert_close(one, other, 1e-9)
    (batch,) = option_batches_from_ids(test, 3)
    pads = batch["input_ids"].new_zeros(len(batch["group"]), 2)
    left = {
        key: torch.cat([pads.to(value.dtype), value], 1) if value.dim() == 2 else value
        for key, value in batch.items()
    }
    assert_close(la.predict(left), la.predict(batch), 1e-9)


def test_held_out_tuning_and_links() -> None:
    train, held_out = examples(6), examples(5, 2)
    la = LaplaceLoRA(tiny.tiny_llama(), Options()).fit(option_batches_from_ids(train, 3), progress=False)
    grid = (1e-6, 0.01, 0.1, 1.0, 10.0, 1e9)
    batches = option_batches_from_ids(held_out, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LaplaceWarning)  # of the grid's edge
        best = la.optimize_prior_precision(HeldOut(batches, grid=grid), progress=False)
    nll = [la.predictions(batches, prior_precision=prior, progress=False).metrics().nll for prior in grid]
    assert best == grid[nll.index(min(nll))]
    for link in ("mc", "bridge", "map"):
        probs = la.predictions(batches, link_approx=link, progress=False).probs
        assert_close(probs.sum(1), torch.ones(5, dtype=torch.float64), 1e-9)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"option_mask": None}, "needs 'option_mask'"),
        ({"option_mask": torch.ones(2, 4, dtype=torch.bool)}, "first token"),
        ({"option_mask": torch.zeros(2, 4, dtype=torch.bool)}, "no token in 'option_mask'"),
        ({"labels": torch.tensor([0, 1])}, "one label an example|class indices"),
    ],
)
def test_wrong_batches(change: dict[str, Tensor | None], match: str) -> None:
    (batch,) = option_batches_from_ids([([3, 4], [[5, 6], [7, 8]], 0)], 1)
    batch = {key: value for key, value in (batch | change).items() if value is not None}
    with pytest.raises(InvalidBatchError, match=match):
        LaplaceLoRA(tiny.tiny_llama(), Options()).fit([batch], progress=False)


def test_a_multiple_choice_head() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
    )
    model = trainable(tiny.adapt(transformers.BertForMultipleChoice(config), targets=("query", "value")))
    ids = torch.randint(1, 48, (4, 3, 5), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2, 1])}
    la = LaplaceLoRA(model, Options(), structure=EXACT, prior_precision=0.5).fit([batch], progress=False)
    weights = [p for name, p in model.named_parameters() if "lora_" in name]
    hessian = 0.5 * torch.eye(sum(w.numel() for w in weights), dtype=torch.float64)
    for example in ids:
        u = model(input_ids=example[None]).logits[0]
        rows = torch.stack(
            [torch.cat([g.flatten() for g in torch.autograd.grad(f, weights, retain_graph=True)]) for f in u]
        )
        p = u.detach().softmax(0)
        hessian += rows.mT @ (torch.diag(p) - torch.outer(p, p)) @ rows
    _, logdet = torch.linalg.slogdet(hessian)
    assert_close(la.posterior.log_det_ratio(), logdet - len(hessian) * math.log(0.5), 1e-7)


class Words:
    """A tokenizer of words, with a chat template; `end` appends an end-of-sequence token."""

    eos_token_id = 2
    pad_token_id = 0

    def __init__(self, end: bool = False) -> None:
        self.end = end

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [3 + sum(map(ord, word)) % 40 for word in text.split()]
        return {"input_ids": ids + [2] * (self.end and add_special_tokens)}

    def apply_chat_template(self, messages, tokenize: bool, add_generation_prompt: bool = False) -> str:
        text = " ".join(f"<{m['role']}> {m['content']}" for m in messages)
        return text + " <assistant>" * add_generation_prompt


def test_preferences_are_bradley_terry() -> None:
    model = trainable(tiny.tiny_llama_classifier(1))
    rows = [{"prompt": f"q{i} a", "chosen": " b c" * (1 + i % 2), "rejected": " d"} for i in range(4)]
    batches = preference_batches(Words(), rows, 2)
    la = LaplaceLoRA(model, Preference(), structure=EXACT, prior_precision=0.9).fit(batches, progress=False)
    weights = [p for name, p in model.named_parameters() if "lora_" in name]
    hessian = 0.9 * torch.eye(sum(w.numel() for w in weights), dtype=torch.float64)
    fit = 0.0
    for row in rows:
        chosen, rejected = (
            model(input_ids=torch.tensor([Words()(row["prompt"] + row[side])["input_ids"] + [2]])).logits[
                0, 0
            ]
            for side in ("chosen", "rejected")
        )
        J = torch.cat([g.flatten() for g in torch.autograd.grad(rejected - chosen, weights)])
        p = (chosen - rejected).detach().sigmoid()
        fit += p.log()
        hessian += p * (1 - p) * torch.outer(J, J)
    norm = sum(w.detach().square().sum() for w in weights)
    expected = fit - 0.5 * (0.9 * norm + hessian.logdet() - len(hessian) * math.log(0.9))
    assert_close(la.log_marginal_likelihood(), expected, 1e-9)
    chats = [
        {
            side: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            for side in ("chosen", "rejected")
        }
        for row in rows
    ]
    assert la.predict(preference_batches(Words(), chats, 4)[0]).shape == (4, 2)


def test_reward_models_have_one_output() -> None:
    with pytest.raises(ValueError, match="one output, this one has 3"):
        LaplaceLoRA(tiny.tiny_llama_classifier(3), Preference())


@pytest.mark.parametrize("end", [False, True])
def test_options_from_text_and_chats(end: bool) -> None:
    from laplace_lora_fast.data import option_batches

    tokenizer = Words(end)
    rows = [
        {"prompt": "one two", "choices": ["three", "four five"], "label": 1},
        {"prompt": [{"role": "user", "content": "one"}], "choices": ["two", "three", "four"], "label": 0},
    ]
    batches = option_batches(tokenizer, rows, 2)
    (batch,) = batches
    assert batch["group"].tolist() == [0, 0, 1, 1, 1]
    assert batch["labels"].tolist() == [1, 0]
    words = [
        Words()(text)["input_ids"]
        for text in ("one two three", "one two four five", "<user> one <assistant> two")
    ]
    for row, ids in zip(batch["input_ids"], words, strict=False):
        assert row[: len(ids)].tolist() == ids
        assert not row[len(ids) :].any()
    assert batch["option_mask"].sum(1).tolist() == [1, 2, 1, 1, 1]
