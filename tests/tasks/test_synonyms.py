"""Answers that several tokens spell: the sum of their probabilities, against autograd and the dense posterior."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from laplace_lora_fast import Answers, AnyOf, LaplaceLoRA, Rows
from laplace_lora_fast.integrations.trainer import answer_batch
from laplace_lora_fast.options import from_json, to_json
from tests import oracle, tiny
from tests.oracle import assert_close

SPELLED = (AnyOf([5, 9]), 11, AnyOf((7, 20, 3)))
FLAT = [5, 9, 11, 7, 20, 3]


def logits(model: nn.Module, single: tiny.Batch) -> Tensor:
    last = model(input_ids=single["input_ids"]).logits[0, -1]
    return torch.stack([last[[5, 9]].logsumexp(0), last[11], last[[7, 20, 3]].logsumexp(0)])


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("v_proj", "lm_head")])
def test_against_the_dense_posterior(targets: tuple[str, ...]) -> None:
    model, train, test = tiny.tiny_llama(targets=targets).eval(), tiny.batch(6), tiny.batch(4, seed=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    la = LaplaceLoRA(model, Answers(SPELLED), structure=Rows(columns=1 << 20), prior_precision=0.7)
    la.fit([train], progress=False)
    rows = torch.cat(list(oracle.jacobians(model, train, logits).values()), 2)
    fit, hessian = 0.0, 0.7 * torch.eye(rows.shape[2], dtype=torch.float64)
    for single, J in zip(oracle.examples(train), rows, strict=True):
        f = logits(model, single).detach()
        fit += f.log_softmax(0)[single["labels"][0]]
        hessian += J.mT @ oracle.softmax_hessian(f) @ J
    if "lm_head" not in targets:  # else rows of lora_B that no answer uses count in the norm alone
        norm = sum(p.detach().square().sum() for n, p in model.named_parameters() if "lora_" in n)
        expected = fit - 0.5 * (0.7 * norm + hessian.logdet() - len(hessian) * math.log(0.7))
        assert_close(la.log_marginal_likelihood(), expected, 1e-9)
    mean, cov = la.logit_distribution(test)
    J = torch.cat(list(oracle.jacobians(model, test, logits).values()), 2)
    assert_close(
        mean, torch.stack([logits(model, single).detach() for single in oracle.examples(test)]), 1e-9
    )
    assert_close(cov, J @ torch.linalg.inv(hessian) @ J.mT, 1e-8)


def test_probabilities_add_up_over_the_ways_to_spell() -> None:
    la = LaplaceLoRA(tiny.tiny_llama(), Answers(SPELLED)).fit([tiny.batch(6)], progress=False)
    batch = tiny.batch(4, seed=1)
    each = (
        LaplaceLoRA(la.model, Answers(FLAT))
        .fit([tiny.batch(6)], progress=False)
        .predict(batch, link_approx="map")
    )
    expected = torch.stack([each[:, :2].sum(1), each[:, 2], each[:, 3:].sum(1)], 1)
    assert_close(la.predict(batch, link_approx="map"), expected, 1e-9)


def test_forms() -> None:
    assert repr(Answers(SPELLED)) == "Answers(token_ids=(AnyOf(tokens=(5, 9)), 11, AnyOf(tokens=(7, 20, 3))))"
    assert from_json(to_json(Answers(SPELLED))) == Answers(SPELLED)
    assert Answers(list(SPELLED)).spellings == [[5, 9], [11], [7, 20, 3]]


def test_saving(tmp_path) -> None:
    la = LaplaceLoRA(tiny.tiny_llama(), Answers(SPELLED)).fit([tiny.batch(6)], progress=False)
    la.save(tmp_path)
    again = LaplaceLoRA.load(tmp_path, la.model)
    assert again.task == Answers(SPELLED)
    assert torch.equal(again.predict(tiny.batch(3)), la.predict(tiny.batch(3)))


@pytest.mark.parametrize(
    ("token_ids", "match"),
    [
        ([AnyOf([5, 9])], "at least two integers"),
        ([AnyOf([5, 9]), AnyOf([9])], "repeats a token"),
        ([AnyOf([5, 9]), "a"], "token_ids must be integers"),
        ([AnyOf([5, 9]), [3, 4]], "token_ids must be integers"),  # an answer of two tokens is another thing
        ([[5, 9], [3, 4]], "at least two integers"),
        ("no", "at least two integers"),
    ],
)
def test_what_is_refused(token_ids, match) -> None:
    with pytest.raises(ValueError, match=match):
        Answers(token_ids)


def test_no_tokens_and_unknown_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens must be integers"):
        AnyOf([])
    with pytest.raises(ValueError, match="must lie in"):
        LaplaceLoRA(tiny.tiny_llama(), Answers([AnyOf([5, 99]), 3]))


def test_labels_of_a_trainer_may_be_any_way_to_spell_them() -> None:
    labels = torch.full((3, 4), -100)
    labels[[0, 1, 2], [2, 3, 2]] = torch.tensor([9, 20, 11])
    batch = {"input_ids": torch.ones(3, 4, dtype=torch.long), "labels": labels}
    assert answer_batch(batch, Answers(SPELLED).spellings)["labels"].tolist() == [0, 2, 1]
