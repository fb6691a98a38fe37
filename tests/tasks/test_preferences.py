"""Rankings and implicit rewards against autograd, one sequence at a time; batches as TRL makes them."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from laplace_lora_fast import (
    DirectPreference,
    HeldOut,
    InvalidBatchError,
    LaplaceLoRA,
    LaplaceWarning,
    LeaveOneOut,
    Preference,
    Rows,
)
from laplace_lora_fast.data import (
    add_reference,
    direct_preference_batches,
    option_batches_from_ids,
    preference_batches,
    preference_batches_from_ids,
)
from laplace_lora_fast.likelihoods import PlackettLuce
from tests import tiny
from tests.oracle import assert_close
from tests.tasks.test_options import EXACT, Words, trainable

PRIOR = 0.8


def ranked(n: int, seed: int = 0, sizes: tuple[int, int] = (2, 5)) -> list[tuple[list[list[int]], list[int]]]:
    """Groups of 2 to 4 sequences of 2 to 5 tokens with an order."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        size = int(torch.randint(*sizes, (), generator=generator))
        lengths = torch.randint(2, 6, (size,), generator=generator).tolist()
        sequences = [torch.randint(1, 48, (length,), generator=generator).tolist() for length in lengths]
        found.append((sequences, torch.randperm(size, generator=generator).tolist()))
    return found


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if "lora_" in name]


def rows_of(model: nn.Module, scores: Tensor) -> Tensor:
    weights = weights_of(model)
    grads = [torch.autograd.grad(u, weights, retain_graph=True) for u in scores]
    return torch.stack([torch.cat([g.flatten() for g in each]) for each in grads])


def rewards(model: nn.Module, sequences: list[list[int]]) -> Tensor:
    return torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in sequences])


def test_rankings_against_the_dense_posterior() -> None:
    model, train, test = trainable(tiny.tiny_llama_classifier(1)), ranked(5), ranked(4, 1)
    la = LaplaceLoRA(model, Preference(ranking=True), structure=EXACT, prior_precision=PRIOR)
    la.fit(preference_batches_from_ids(train, 2), progress=False)
    hessian = PRIOR * torch.eye(sum(w.numel() for w in weights_of(model)), dtype=torch.float64)
    fit = 0.0
    for sequences, order in train:
        u = rewards(model, sequences)
        ordered, J = u.detach()[order], rows_of(model, u)
        fit += sum(float(ordered[i] - ordered[i:].logsumexp(0)) for i in range(len(order)))
        root = PlackettLuce().hessian_root(u.detach()[None])[0]  # against every order: see its own tests
        hessian += J.mT @ root @ root.mT @ J
    norm = sum(float(w.detach().square().sum()) for w in weights_of(model))
    expected = fit - 0.5 * (PRIOR * norm + hessian.logdet() - len(hessian) * math.log(PRIOR))
    assert_close(la.log_marginal_likelihood(), expected, 1e-9)
    covariance = torch.linalg.inv(hessian)
    (batch,) = preference_batches_from_ids(test, 4)
    found = la.reward(batch)
    places = sorted(range(4), key=lambda i: max(map(len, test[i][0])))
    for place, (mean, cov) in zip(places, zip(found.mean, found.covariance, strict=True), strict=True):
        u = rewards(model, test[place][0])
        J = rows_of(model, u)
        assert_close(mean, u.detach(), 1e-9)
        assert_close(cov, J @ covariance @ J.mT, 1e-8)
    predictions = la.predictions([batch], progress=False)
    assert predictions.labels.tolist() == [test[place][1][0] for place in places]
    plain = la.predictions([batch], link_approx="map", progress=False)
    assert plain.labels.tolist() == predictions.labels.tolist()


def test_rankings_of_two_are_pairs(tmp_path: Path) -> None:
    model, train = tiny.tiny_llama_classifier(1), ranked(5, sizes=(2, 3))
    batches = (
        preference_batches_from_ids(train, 3),
        preference_batches_from_ids([(sequences, order[0]) for sequences, order in train], 3),
    )
    found = []
    for task, data in zip((Preference(ranking=True), Preference()), batches, strict=True):
        la = LaplaceLoRA(model, task, structure=Rows(columns=64, refit=True)).fit(data, progress=False)
        left_out = la.posterior.curvature.leave_one_out(torch.ones(8, dtype=torch.float64))
        probs = la.predict(data[0], link_approx="mc")
        found.append((la.log_marginal_likelihood(), probs, left_out[0][1], left_out[0][2]))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 1e-7)  # Fisher scoring and Newton's method stop at 1e-9
    ranking = LaplaceLoRA(model, Preference(ranking=True)).fit(batches[0], progress=False)
    ranking.save(tmp_path)
    again = LaplaceLoRA.load(tmp_path, model)
    assert again.task == Preference(ranking=True)
    assert torch.equal(again.predict(batches[0][0]), ranking.predict(batches[0][0]))


def test_a_refit_to_rankings_is_its_optimum_and_tunes() -> None:
    train = preference_batches_from_ids(ranked(8), 4)
    la = LaplaceLoRA(tiny.tiny_llama_classifier(1), Preference(ranking=True), structure=Rows(refit=True))
    la.fit(train, progress=False)
    curvature = la.posterior.curvature
    for prior in (0.1, 1.0, 100.0):
        mode = curvature.mode(torch.full((8,), prior, dtype=torch.float64))
        gradient = curvature.observed.layout.join(curvature.observed.gradient(mode.functions))
        assert (mode.alpha - gradient).abs().max() < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LaplaceWarning)  # of the grid's edge
        for way in (LeaveOneOut(grid=(0.1, 1.0, 10.0)), HeldOut(train, grid=(0.1, 1.0, 10.0))):
            assert la.optimize_prior_precision(way, progress=False) in (0.1, 1.0, 10.0)
    with pytest.raises(ValueError, match="link_approx must be one of"):
        la.predict(train[0], link_approx="probit")


def rows(n: int) -> list[dict[str, str]]:
    return [{"prompt": f"q{i} a", "chosen": " b c" * (1 + i % 2), "rejected": " d e"} for i in range(n)]


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("v_proj", "lm_head")])
def test_direct_preferences_against_the_dense_posterior(targets: tuple[str, ...]) -> None:
    """The reference is the model without its adapter, whose rewards are then zero: a refit starts from there."""
    beta, model = 0.3, trainable(tiny.tiny_llama(targets=targets))
    flags = [p.requires_grad for p in model.parameters()]
    batches = add_reference(model, direct_preference_batches(Words(), rows(4), 3))
    assert [p.requires_grad for p in model.parameters()] == flags

    def log_prob(prompt: str, answer: str) -> Tensor:
        whole, stem = Words()(prompt + answer)["input_ids"] + [2], len(Words()(prompt)["input_ids"])
        log_probs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        return torch.stack([log_probs[i - 1, whole[i]] for i in range(stem, len(whole))]).sum()

    def implicit(row: dict[str, str]) -> Tensor:
        u = torch.stack([log_prob(row["prompt"], row[side]) for side in ("chosen", "rejected")])
        with torch.no_grad(), model.disable_adapter():
            reference = [log_prob(row["prompt"], row[side]) for side in ("chosen", "rejected")]
        return beta * (u - torch.stack(reference))

    task = DirectPreference(beta=beta)
    la = LaplaceLoRA(model, task, structure=EXACT, prior_precision=PRIOR).fit(batches, progress=False)
    hessian, fit = 0.0, 0.0
    for row in rows(4):
        u = implicit(row)
        J = rows_of(model, u)
        J = J[0] - J[1]
        p = (u[0] - u[1]).detach().sigmoid()
        fit += p.log()
        hessian = hessian + p * (1 - p) * torch.outer(J, J)
    hessian = hessian + PRIOR * torch.eye(len(hessian), dtype=torch.float64)
    norm = sum(float(w.detach().square().sum()) for w in weights_of(model))
    expected = fit - 0.5 * (PRIOR * norm + hessian.logdet() - len(hessian) * math.log(PRIOR))
    assert_close(la.log_marginal_likelihood(), expected, 1e-9)
    prior = LaplaceLoRA(model, task, structure=Rows(refit=True)).fit(batches, progress=False)
    assert max(each.abs().max() for each in prior.posterior.curvature.observed.prior) < 1e-10


def test_what_direct_preferences_refuse() -> None:
    model = tiny.tiny_llama()
    batches = direct_preference_batches(Words(), rows(2), 2)
    la = LaplaceLoRA(model, DirectPreference())
    with pytest.raises(InvalidBatchError, match="needs 'reference'"):
        la.fit(batches, progress=False)
    with pytest.raises(InvalidBatchError, match="must hold 4 log probabilities"):
        la.fit([batches[0] | {"reference": torch.zeros(3)}], progress=False)
    with pytest.raises(ValueError, match="beta must be positive"):
        DirectPreference(beta=0.0)
    with pytest.raises(ValueError, match="ranking must be True or False"):
        Preference(ranking=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="DirectPreference needs a causal language model"):
        LaplaceLoRA(tiny.tiny_llama_classifier(1), DirectPreference())


def test_batches_of_preferences() -> None:
    """The end-of-sequence token closes a text once; rankings and candidates; rows are named."""
    texts = [{"ranked": ["a b", "c", "d e f"]}, {"prompt": "q ", "ranked": ["a", "b"]}]
    (batch,) = preference_batches(Words(), texts, 2, ranking=True)
    assert batch["group"].tolist() == [0, 0, 1, 1, 1]
    assert batch["labels"].tolist() == [[0, 1, -1], [0, 1, 2]]
    ends = batch["input_ids"].gather(1, batch["attention_mask"].sum(1, keepdim=True) - 1)
    assert (ends == Words.eos_token_id).all()
    appended = preference_batches(Words(end=True), texts, 2, ranking=True)[0]
    assert torch.equal(appended["input_ids"], batch["input_ids"])
    for pad, expected in ((47, 47), (None, Words.eos_token_id)):
        Padding = type("Padding", (Words,), {"pad_token_id": pad})
        other = preference_batches(Padding(), texts, 2)[0]
        assert (other["input_ids"][other["attention_mask"] == 0] == expected).all()
    assert preference_batches(Words(), texts, 2)[0]["labels"].tolist() == [0, 0]
    (candidates,) = preference_batches(Words(), [{"prompt": "q ", "candidates": ["a", "b", "c"]}], 2)
    assert "labels" not in candidates
    with pytest.raises(InvalidBatchError, match="row 2: field 'rejected' is missing"):
        preference_batches(Words(), [texts[0], {"chosen": "a"}], 2)
    with pytest.raises(InvalidBatchError, match="row 1: field 'prompt' is missing"):
        direct_preference_batches(Words(), texts[:1], 2)
    with pytest.raises(InvalidBatchError, match="row 1 has 4 tokens, the model's context is 3"):
        preference_batches(Words(), texts, 2, max_length=3)
    with pytest.warns(LaplaceWarning, match="truncate=True cut 1 of 5 prompts to the model's 3 tokens"):
        (cut,) = preference_batches(Words(), texts, 2, ranking=True, max_length=3, truncate=True)
    assert cut["input_ids"].shape[1] == 3
    for label in (2, [0, 0], [0, 1, 2]):
        with pytest.raises(InvalidBatchError, match="an example of 2 sequences has label"):
            preference_batches_from_ids([([[3], [4]], label)], 1)
    with pytest.raises(InvalidBatchError, match="some examples have a ranking"):
        preference_batches_from_ids([([[3], [4]], 1), ([[3], [4]], [1, 0])], 2)
    with pytest.raises(InvalidBatchError, match="at least two sequences"):
        preference_batches_from_ids([([[3]], 0)], 1)


def test_options_may_be_ranked_too() -> None:
    (batch,) = option_batches_from_ids([([3], [[4], [5, 6], [7]], [2, 0, 1]), ([3], [[4], [5]], [1, 0])], 2)
    assert batch["labels"].tolist() == [[1, 0, -1], [2, 0, 1]]


CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}" + (
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.mark.parametrize("kind", ["text", "prompt", "chat"])
def test_batches_are_those_of_trl(kind: str, tmp_path: Path) -> None:
    """Of RewardTrainer and DPOTrainer themselves, where TRL is installed."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from tests import words

    tokenizer = words.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "[END]", "pad_token": "[PAD]"})
    tokenizer.chat_template = CHAT
    side = {"chosen": " good film", "rejected": " bad plot A"}
    if kind == "chat":
        side = {k: [{"role": "assistant", "content": v.strip()}] for k, v in side.items()}
        listed = [{"prompt": [{"role": "user", "content": "the film"}], **side}]
    else:
        listed = [({"prompt": "the film"} if kind == "prompt" else {}) | side]
    common = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "max_steps": 1}
    made = datasets.Dataset.from_list(listed)
    model = tiny.tiny_llama_classifier(1, torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    trainer = trl.RewardTrainer(
        model=model, args=trl.RewardConfig(**common), train_dataset=made, processing_class=tokenizer
    )
    (batch,) = preference_batches(tokenizer, listed, 1)
    own = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert own == [trainer.train_dataset[0][name] for name in ("chosen_ids", "rejected_ids")]
    if kind == "text":
        return
    causal = tiny.tiny_llama(torch.float32)
    trainer = trl.DPOTrainer(
        model=causal, args=trl.DPOConfig(**common), train_dataset=made, processing_class=tokenizer
    )
    (batch,) = direct_preference_batches(tokenizer, listed, 1)
    row = trainer.train_dataset[0]
    for ids, option, name in zip(
        batch["input_ids"], batch["option_mask"], ("chosen_ids", "rejected_ids"), strict=True
    ):
        assert ids[option].tolist() == row[name]
        assert ids[: len(row["prompt_ids"])].tolist() == row["prompt_ids"]
