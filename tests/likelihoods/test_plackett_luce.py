"""Rankings against every order there is, autograd, and plain sampling."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError
from laplace_lora_fast.likelihoods import Categorical, PlackettLuce
from tests.oracle import assert_close

LIKELIHOOD = PlackettLuce()
ORDERS = torch.tensor(list(itertools.permutations(range(4))))


def log_p(f: Tensor, order: Tensor) -> Tensor:
    """Choice by choice."""
    total = f.new_zeros(())
    for place in range(len(order) - 1):
        left = f[order[place:]]
        total = total + left[0] - left.logsumexp(0)
    return total


def outputs(n: int = 1, size: int = 4, scale: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return scale * torch.randn(n, size, generator=generator, dtype=torch.float64)


def test_all_orders_add_up_to_one_and_are_as_by_hand() -> None:
    f = outputs()
    each = torch.stack([LIKELIHOOD.log_likelihood(f, order[None]) for order in ORDERS])
    assert_close(each.exp().sum(), torch.tensor(1.0, dtype=torch.float64), 1e-12)
    assert_close(each, torch.stack([log_p(f[0], order) for order in ORDERS]), 1e-12)


def test_residuals_are_gradients() -> None:
    f = outputs(len(ORDERS)).requires_grad_()
    (expected,) = torch.autograd.grad(-LIKELIHOOD.log_likelihood(f, ORDERS), f)
    assert_close(LIKELIHOOD.residual(f.detach(), ORDERS), expected, 1e-12)
    far = torch.tensor([[0.0, 800.0, -800.0]], dtype=torch.float64)
    assert LIKELIHOOD.residual(far, torch.tensor([[1, 0, 2]])).abs().max() < 1e-12


def test_the_root_is_that_of_the_mean_hessian_over_all_orders() -> None:
    f = outputs()[0]
    expected = sum(
        log_p(f, order).exp() * torch.autograd.functional.hessian(lambda v, o=order: -log_p(v, o), f)
        for order in ORDERS
    )
    root = LIKELIHOOD.hessian_root(f[None])[0]
    assert root.shape == (4, 3)
    assert_close(root @ root.mT, expected, 1e-10)
    inner = LIKELIHOOD.functions_root(f[None])[0]
    assert_close(inner @ inner.mT, expected[1:, 1:], 1e-10)


def test_two_are_bradley_and_terry() -> None:
    f, labels = outputs(5, 2), torch.tensor([0, 1, 1, 0, 1])
    orders = torch.stack([labels, 1 - labels], 1)
    other = Categorical()
    assert_close(LIKELIHOOD.log_likelihood(f, orders), other.log_likelihood(f, labels), 1e-12)
    assert_close(LIKELIHOOD.residual(f, orders), other.residual(f, labels), 1e-12)
    one, two = (each.hessian_root(f) for each in (LIKELIHOOD, other))
    assert_close(one @ one.mT, two @ two.mT, 1e-12)
    assert LIKELIHOOD.judged_by(orders).tolist() == labels.tolist()


def test_samples_are_as_likely_as_they_should_be() -> None:
    f = outputs(1, 3)
    drawn = LIKELIHOOD.sample(f.expand(20_000, 3), torch.Generator().manual_seed(0))
    for order in itertools.permutations(range(3)):
        share = float((drawn == torch.tensor(order)).all(1).double().mean())
        assert abs(share - float(log_p(f[0], torch.tensor(order)).exp())) < 0.015


def test_scores_are_of_whole_rankings() -> None:
    mean, cov = outputs(2, 3)[:, 1:], torch.eye(2, dtype=torch.float64).expand(2, 2, 2, 2) * 2.0
    targets = torch.tensor([[2, 0, 1], [0, 1, 2]])
    generator = torch.Generator().manual_seed(0)
    nll, _ = LIKELIHOOD.score(mean, cov, targets, "mc", 1024, generator, None)
    torch.manual_seed(1)
    expected = 0.0
    for m, target in zip(mean, targets, strict=True):
        f = torch.nn.functional.pad(m + math.sqrt(2) * torch.randn(100_000, 2, dtype=torch.float64), (1, 0))
        ordered = f[:, target]
        lse = ordered.flip(1).logcumsumexp(1).flip(1)
        expected -= float((ordered - lse).sum(1).exp().mean().log()) / 2
    assert nll.shape == (2,)
    assert nll[0] == nll[1]
    assert abs(float(nll[0]) - expected) < 0.01


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([0, 1], "2 rankings of 3"),
        ([[0, 1], [1, 0]], "2 rankings of 3"),
        ([[0, 1, 1], [0, 1, 2]], "each sequence of an example once"),
        ([[0, 1, 2, 3], [0, 1, 2, -1]], "each sequence of an example once"),
    ],
)
def test_wrong_rankings(labels: list, match: str) -> None:
    def read() -> None:
        checks = DeferredChecks()
        LIKELIHOOD.targets(torch.tensor(labels), torch.zeros(2, 3), checks)
        checks.settle()

    with pytest.raises(InvalidBatchError, match=match):
        read()


def test_long_rankings_are_refused() -> None:
    with pytest.raises(InvalidBatchError, match="a ranking of 13 sequences is too long"):
        LIKELIHOOD.check(torch.zeros(1, 13))
    with pytest.raises(InvalidBatchError, match="at least 2"):
        LIKELIHOOD.check(torch.zeros(1, 1))
