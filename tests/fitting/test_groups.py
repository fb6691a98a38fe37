"""The whole way where an example is a group of sequences, of unequal sizes, against dense sums."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from laplace_lora_fast import EKFAC, Diagonal, InvalidBatchError, LaplaceLoRA, Rows
from laplace_lora_fast.likelihoods import Categorical, Likelihood
from laplace_lora_fast.model.heads import ClassHead, Head
from laplace_lora_fast.structures import Structure
from laplace_lora_fast.tasks import Task
from tests import oracle, tiny
from tests.oracle import assert_close

LAMBDA = 0.7


class ScoreHead(ClassHead):
    grouped = True


@dataclass(frozen=True)
class Choices(Task):
    """One score a sequence, softmax over the sequences of a group."""

    def head(self, model: nn.Module) -> Head:
        return ScoreHead(model)

    @property
    def likelihood(self) -> Likelihood:
        return Categorical()


def batch(group: list[int], labels: list[int] | None, seed: int) -> tiny.Batch:
    data = tiny.batch(len(group), length=6, seed=seed, padding="right", labels=False)
    data["group"] = torch.tensor(group)
    return data if labels is None else data | {"labels": torch.tensor(labels)}


TRAIN = [
    batch([0, 0, 1, 1, 1, 2, 2], [1, 2, 0], seed=1),
    batch([1, 0, 2, 1, 0, 2, 1, 2], [0, 1, 2], seed=2),
    batch([0, 1, 1, 0, 0, 0], [3, 0], seed=3),
]
TEST = batch([2, 0, 1, 1, 0, 2, 2, 1], None, seed=4)  # of two, three and three sequences


@cache
def model() -> nn.Module:
    return tiny.tiny_llama_classifier(1)


def fitted(structure: Structure) -> LaplaceLoRA:
    la = LaplaceLoRA(model(), Choices(), structure=structure, prior_precision=LAMBDA)
    return la.fit(TRAIN, progress=False)


@dataclass
class Example:
    """Scores [C], their Jacobian [C, P] in all weights, those without the adapter, and the label."""

    scores: Tensor
    jacobian: Tensor
    prior: Tensor
    label: int


@cache
def sequences(index: int) -> tuple[Tensor, Tensor, Tensor]:
    data = [*TRAIN, TEST][index]
    jacobians = torch.cat(list(oracle.jacobians(model(), data, oracle.class_logits).values()), 2)[:, 0]

    def scores() -> Tensor:
        return torch.cat([oracle.class_logits(model(), single) for single in without_group(data)]).detach()

    with model().disable_adapter():
        prior = scores()
    return scores(), jacobians, prior


def without_group(data: tiny.Batch) -> list[tiny.Batch]:
    return oracle.examples({key: value for key, value in data.items() if key not in ("group", "labels")})


def examples(index: int) -> list[Example]:
    data, (scores, jacobian, prior) = [*TRAIN, TEST][index], sequences(index)
    made = []
    for n in range(int(data["group"].max()) + 1):
        own = data["group"] == n
        label = int(data["labels"][n]) if "labels" in data else -1
        made.append(Example(scores[own], jacobian[own], prior[own], label))
    return made


def train_examples() -> list[Example]:
    return [each for index in range(len(TRAIN)) for each in examples(index)]


def dense_precision(fisher: str = "exact") -> Tensor:
    precision = LAMBDA * torch.eye(sequences(0)[1].shape[1], dtype=torch.float64)
    for each in train_examples():
        if fisher == "exact":
            hessian = oracle.softmax_hessian(each.scores)
        else:
            residual = each.scores.softmax(0)
            residual[each.label] -= 1
            hessian = torch.outer(residual, residual)
        precision += each.jacobian.mT @ hessian @ each.jacobian
    return precision


def probit(mean: Tensor, cov: Tensor) -> Tensor:
    """The pairwise link of logits ~ N(mean [C], cov [C, C]), written out."""
    classes = range(len(mean))
    odds = torch.stack(
        [
            1
            / sum(
                torch.exp(
                    (mean[i] - mean[c]) / (1 + torch.pi / 8 * (cov[i, i] + cov[c, c] - 2 * cov[i, c])).sqrt()
                )
                for i in classes
            )
            for c in classes
        ]
    )
    return odds / odds.sum()


def assert_predicts(la: LaplaceLoRA, means: list[Tensor], covs: list[Tensor]) -> None:
    """Examples in their order, zero beyond their number of sequences."""
    found = la.predict(TEST)
    assert found.shape == (3, 3)
    for row, mean, cov in zip(found, means, covs, strict=True):
        assert_close(row[: len(mean)], probit(mean, cov), 1e-8)
        assert row[len(mean) :].abs().sum() == 0


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_rows(fisher: str) -> None:
    la, precision = fitted(Rows(fisher=fisher)), dense_precision(fisher)
    covariance = torch.linalg.inv(precision)
    test = examples(3)
    assert_predicts(la, [e.scores for e in test], [e.jacobian @ covariance @ e.jacobian.mT for e in test])
    ratio = torch.linalg.slogdet(precision / LAMBDA).logabsdet
    assert la.posterior.log_det_ratio().item() == pytest.approx(ratio.item(), rel=1e-8)
    assert la.snapshot()[0].n_examples == 8
    expected = sum(each.scores.log_softmax(0)[each.label] for each in train_examples())
    assert la.snapshot()[0].log_likelihood == pytest.approx(float(expected), rel=1e-10)


def test_diagonal() -> None:
    la = fitted(Diagonal())
    variance = 1 / dense_precision().diagonal()
    test = examples(3)
    assert_predicts(la, [e.scores for e in test], [(e.jacobian * variance) @ e.jacobian.mT for e in test])


def test_ekfac_keeps_the_trace_of_every_weight() -> None:
    la = fitted(EKFAC())
    start, precision = 0, dense_precision()
    for block in la.posterior.curvature.blocks:
        values, counts = block.eigenvalues()
        own = slice(start, start := start + block.mean.numel())
        trace = (precision[own, own].diagonal() - LAMBDA).sum()
        assert (values * counts).sum().item() == pytest.approx(trace.item(), rel=1e-8)


def test_refit() -> None:
    """The mean moves from the scores without the adapter to the linearised model's optimum."""
    la, train = fitted(Rows(refit=True)), train_examples()

    def loss(w: Tensor) -> Tensor:
        terms = [-(each.prior + each.jacobian @ w).log_softmax(0)[each.label] for each in train]
        return sum(terms) + 0.5 * LAMBDA * (w * w).sum()

    w = torch.zeros(sequences(0)[1].shape[1], dtype=torch.float64)
    for _ in range(30):
        w = w - torch.linalg.solve(torch.func.hessian(loss)(w), torch.func.grad(loss)(w))
    assert torch.func.grad(loss)(w).abs().max() < 1e-10
    covariance = torch.linalg.inv(torch.func.hessian(loss)(w))
    test = examples(3)
    means = [each.prior + each.jacobian @ w for each in test]
    assert_predicts(la, means, [e.jacobian @ covariance @ e.jacobian.mT for e in test])


def test_batches_make_no_difference() -> None:
    """The same examples one a batch, in another order."""
    single = []
    for data in reversed(TRAIN):
        for n, label in enumerate(data["labels"]):
            own = data["group"] == n
            inputs = {key: data[key][own] for key in ("input_ids", "attention_mask")}
            single.append(
                inputs | {"group": torch.zeros(int(own.sum()), dtype=torch.long), "labels": label[None]}
            )
    for structure in ("rows", "kfac", "ekfac", "diagonal", Rows(refit=True)):
        la, other = (
            LaplaceLoRA(model(), Choices(), structure=structure).fit(loader, progress=False)
            for loader in (TRAIN, single)
        )
        assert_close(other.predict(TEST), la.predict(TEST), 1e-8)
        assert_close(other.log_marginal_likelihood()[None], la.log_marginal_likelihood()[None], 1e-9)


def test_a_list_of_priors_and_a_loader() -> None:
    la = fitted(Rows())
    many = la.predict(TEST, prior_precision=[0.2, LAMBDA])
    assert_close(many[1], la.predict(TEST), 1e-9)
    found = la.predictions([TEST, TRAIN[0]], progress=False)
    assert_close(found.probs[:3], la.predict(TEST), 1e-9)
    assert_close(found.probs[3:], la.predict(TRAIN[0]), 1e-9)
    assert found.labels is None
    plain = la.predictions([TRAIN[0]], link_approx="map", progress=False)
    assert torch.equal(plain.labels, TRAIN[0]["labels"])
    for row, each in zip(plain.probs, examples(0), strict=True):
        assert_close(row[: len(each.scores)], each.scores.softmax(0), 1e-9)


def test_auto_counts_functions_not_sequences() -> None:
    la = LaplaceLoRA(model(), Choices()).fit(TRAIN, progress=False)
    assert la.snapshot()[0].structure == Rows()
    assert "about 12 rows" in la.summary()  # the first batch's 1 + 2 + 1, three times


def test_batches_without_their_groups() -> None:
    la = LaplaceLoRA(model(), Choices(), structure="rows")
    for change, match in (
        ({"group": None}, "needs 'group'"),
        ({"group": torch.tensor([0, 0, 1, 1, 1, 3, 3])}, "example 2 of a batch has no sequence"),
        ({"labels": torch.tensor([0, 0])}, "one label an example, 3, got 2"),
        ({"labels": torch.tensor([2, 0, 0])}, r"must lie in \[0, 2\)"),
    ):
        with pytest.raises(InvalidBatchError, match=match):
            la.fit([TRAIN[0] | change], progress=False)
