"""What every task must do; the toy one has examples of several sequences, ragged, and is checked against autograd."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from laplace_lora_fast import (
    Answers,
    Classes,
    DirectPreference,
    InvalidBatchError,
    LaplaceLoRA,
    MultiLabel,
    Options,
    Outputs,
    Preference,
    Regression,
    Rows,
    Tokens,
)
from laplace_lora_fast.options import from_json, kinds, to_json
from laplace_lora_fast.structures.base import Structure
from laplace_lora_fast.tasks import Task
from tests import tiny
from tests.contracts import toys
from tests.oracle import assert_close

TASKS = {
    "Answers": (tiny.tiny_llama, Answers(tiny.ANSWERS)),
    "Classes": (lambda: tiny.tiny_llama_classifier(3), Classes()),
    "MultiLabel": (lambda: tiny.tiny_llama_classifier(3), MultiLabel()),
    "Regression": (lambda: tiny.tiny_llama_classifier(2), Regression(noise=0.5)),
    "Outputs": (tiny.tiny_llama, Outputs(lambda output, batch: output.logits[:, -1, :3])),
    "Options": (tiny.tiny_llama, Options()),
    "Preference": (lambda: tiny.tiny_llama_classifier(1), Preference()),
    "rankings": (lambda: tiny.tiny_llama_classifier(1), Preference(ranking=True)),
    "DirectPreference": (tiny.tiny_llama, DirectPreference(beta=0.5)),
    "BestOf": (tiny.tiny_llama, toys.BestOf()),
    "Tokens": (tiny.tiny_llama, Tokens(samples=2)),
}
GROUPED = (toys.BestOf, Options, Preference, DirectPreference)
GROUP = torch.tensor([0, 0, 1, 1, 1, 2, 2])  # examples of 2, 3 and 2 sequences


def data(task: Task, seed: int = 0) -> tiny.Batch:
    batch = tiny.batch(
        7, length=6, seed=seed, padding="left" if isinstance(task, Answers | Outputs) else "right"
    )
    if isinstance(task, GROUPED):
        batch |= {"group": GROUP, "labels": torch.tensor([1, 2, 0])}
    if isinstance(task, Preference) and task.ranking:
        batch["labels"] = torch.tensor([[1, 0, -1], [2, 0, 1], [0, 1, -1]])
    if isinstance(task, DirectPreference):
        batch["reference"] = -torch.arange(7, dtype=torch.float64)
    if isinstance(task, Options | DirectPreference):
        real = batch["attention_mask"].sum(1, keepdim=True)
        place = torch.arange(6)
        batch["option_mask"] = (
            (place >= real - 1 - (torch.arange(7)[:, None] % 2)) & (place < real) & (place > 0)
        )
    if isinstance(task, Tokens):
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if isinstance(task, MultiLabel):
        generator = torch.Generator().manual_seed(seed)
        batch["labels"] = torch.randint(0, 2, (7, 3), generator=generator)
    if isinstance(task, Regression):
        generator = torch.Generator().manual_seed(seed)
        batch["labels"] = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    return batch


def answered(la: LaplaceLoRA, batch: tiny.Batch) -> Tensor:
    """What the task answers: the scores of texts where that is a distribution at every token."""
    return torch.stack(la.sequence_log_prob(batch)) if la.likelihood.sampled else la.predict(batch)


def test_every_task_of_the_package_is_here() -> None:
    own = {kind.__name__ for kind in kinds(Task) if kind.__module__.startswith("laplace_lora_fast")}
    assert own <= set(TASKS)


@pytest.mark.parametrize("name", TASKS)
class TestTask:
    def test_repr_and_json(self, name: str) -> None:
        task = TASKS[name][1]
        assert repr(task).startswith(type(task).__name__ + "(")
        if not task.code:
            assert from_json(to_json(task)) == task

    @pytest.mark.parametrize(
        "structure", [kind() for kind in kinds(Structure)], ids=lambda s: type(s).__name__
    )
    def test_all_structures_serve_it(self, name: str, structure: Structure, tmp_path: Path) -> None:
        make, task = TASKS[name]
        la = LaplaceLoRA(make(), task, structure=structure).fit([data(task)], progress=False)
        answer = answered(la, data(task, 1))
        assert answer.isfinite().all()
        if not task.likelihood.sampled:
            assert la.log_marginal_likelihood().isfinite()
        la.save(tmp_path)
        again = LaplaceLoRA.load(tmp_path, la.model, task=task if task.code else None)
        assert torch.equal(answered(again, data(task, 1)), answer)

    def test_labels_are_not_needed_to_predict(self, name: str) -> None:
        make, task = TASKS[name]
        la = LaplaceLoRA(make(), task).fit([data(task)], progress=False)
        batch = data(task, 1)
        without = {key: value for key, value in batch.items() if key != "labels"}
        assert torch.equal(answered(la, batch), answered(la, without))

    def test_a_deep_copy_answers_the_same(self, name: str) -> None:
        make, task = TASKS[name]
        la = LaplaceLoRA(make(), task).fit([data(task)], progress=False)
        other = deepcopy(la)
        assert other.model is not la.model
        assert torch.equal(answered(other, data(task, 1)), answered(la, data(task, 1)))


def scores(model: nn.Module, batch: tiny.Batch) -> list[Tensor]:
    """The score of each sequence alone, without its pads."""
    found = []
    for row in range(len(batch["input_ids"])):
        keep = batch["attention_mask"][row].bool()
        found.append(model(input_ids=batch["input_ids"][row][keep][None]).logits[0, -1, 3])
    return found


def contrast_rows(model: nn.Module, batch: tiny.Batch) -> tuple[list[Tensor], list[Tensor]]:
    """For each example the contrasts of its scores, and their gradients in all LoRA weights."""
    weights = [p for name, p in model.named_parameters() if "lora_" in name]
    values, rows = [], []
    all_scores = scores(model, batch)
    for example in range(3):
        own = [s for s, g in zip(all_scores, batch["group"].tolist(), strict=True) if g == example]
        contrasts = [s - own[0] for s in own[1:]]
        values.append(torch.stack(contrasts).detach())
        grads = [torch.autograd.grad(c, weights, retain_graph=True) for c in contrasts]
        rows.append(torch.stack([torch.cat([g.flatten() for g in each]) for each in grads]))
    return values, rows


def test_groups_against_the_dense_posterior() -> None:
    """Ragged examples: probabilities, evidence and variances of the exact GGN from autograd, one sequence at a time."""
    model, task = tiny.tiny_llama().eval(), toys.BestOf()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    train, test = data(task), data(task, 1)
    la = LaplaceLoRA(model, task, structure=Rows(columns=64), prior_precision=0.6)
    la.fit([train], progress=False)
    values, rows = contrast_rows(model, train)
    hessian = 0.6 * torch.eye(rows[0].shape[1], dtype=torch.float64)
    log_likelihood = 0.0
    for f, J, label in zip(values, rows, [1, 2, 0], strict=True):
        logits = torch.cat([torch.zeros(1, dtype=torch.float64), f])
        p = logits.softmax(0)
        log_likelihood += p[label].log()
        H = (torch.diag(p) - torch.outer(p, p))[1:, 1:]
        hessian += J.mT @ H @ J
    norm = sum(p.square().sum() for name, p in model.named_parameters() if "lora_" in name).detach()
    size = len(hessian)
    evidence = log_likelihood - 0.5 * (0.6 * norm + hessian.logdet() - size * math.log(0.6))
    assert_close(la.log_marginal_likelihood(), evidence, 1e-9)
    covariance = torch.linalg.inv(hessian)
    found = la.predict(test)
    for example, (f, J) in enumerate(zip(*contrast_rows(model, test), strict=True)):
        cov = J @ covariance @ J.mT
        padded = torch.nn.functional.pad(cov, (1, 0, 1, 0))
        pairwise = padded.diagonal()[:, None] + padded.diagonal() - 2 * padded
        m = torch.cat([torch.zeros(1, dtype=torch.float64), f])
        z = (m[:, None] - m) / (1 + math.pi / 8 * pairwise).sqrt()
        expected = (-torch.logsumexp(-z, 1)).softmax(0)
        assert_close(found[example, : len(expected)], expected, 1e-9)
        assert not found[example, len(expected) :].any()


@pytest.mark.parametrize("structure", [kind() for kind in kinds(Structure)], ids=lambda s: type(s).__name__)
def test_groups_do_not_feel_how_they_are_batched(structure: Structure) -> None:
    task = toys.BestOf()
    train = data(task)
    parts = [
        {key: value[:5] for key, value in train.items()},
        {key: value[5:] for key, value in train.items()},
    ]
    parts[0]["labels"], parts[1]["labels"] = train["labels"][:2], train["labels"][2:]
    parts[1]["group"] = parts[1]["group"] - 2
    order = torch.tensor([2, 0, 5, 3, 1, 4, 6])  # members of a group keep their order
    shuffled = {key: value[order] for key, value in train.items() if key != "labels"}
    results = []
    for loader in ([train], parts, [shuffled | {"labels": train["labels"]}]):
        la = LaplaceLoRA(tiny.tiny_llama(), task, structure=structure).fit(loader, progress=False)
        results.append(la.predict(data(task, 1)))
    assert_close(results[1], results[0], 1e-9)
    assert_close(results[2], results[0], 1e-9)


@pytest.mark.parametrize(
    ("group", "match"),
    [
        (None, "needs 'group'"),
        (torch.tensor([0, 0, 2, 2, 2, 3, 3]), "whole examples"),
        (torch.zeros(3, dtype=torch.long), "7 indices"),
    ],
)
def test_wrong_groups_are_refused(group: Tensor | None, match: str) -> None:
    batch = data(toys.BestOf())
    batch = {key: value for key, value in batch.items() if key != "group"}
    la = LaplaceLoRA(tiny.tiny_llama(), toys.BestOf())
    with pytest.raises(InvalidBatchError, match=match):
        la.fit([batch if group is None else batch | {"group": group}], progress=False)


def test_a_group_is_refused_where_each_sequence_is_an_example() -> None:
    la = LaplaceLoRA(tiny.tiny_llama(), Answers(tiny.ANSWERS))
    with pytest.raises(InvalidBatchError, match="each sequence is an example"):
        la.fit([tiny.batch(7) | {"group": GROUP}], progress=False)
