"""Refits of examples with unequal numbers of functions against Newton over dense weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from laplace_lora_fast.likelihoods import Categorical, Gaussian, Likelihood
from laplace_lora_fast.structures.rows.layout import BlockDiagonal, Layout
from laplace_lora_fast.structures.rows.refits.left_out import leave_one_out
from laplace_lora_fast.structures.rows.refits.mode import Observations, newton
from tests.oracle import assert_close

SIZES = [2, 1, 3, 2, 1, 3, 3, 2]  # functions of each example
PARAMETERS = 9
NOISE = 0.6


@dataclass
class Example:
    """Functions f = m + J w of weights w ~ N(0, I), and what was observed of them."""

    prior: Tensor
    jacobian: Tensor
    target: Tensor

    def functions(self, w: Tensor) -> Tensor:
        return self.prior + self.jacobian @ w


def examples(classification: bool) -> list[Example]:
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = []
    for size in SIZES:
        target = torch.randint(0, size + 1, (), generator=generator) if classification else noise(size)
        made.append(Example(noise(size), noise(size, PARAMETERS), target))
    return made


def softmax_nll(f: Tensor, target: Tensor) -> Tensor:
    """The first class has the logit 0."""
    return -torch.nn.functional.pad(f, (1, 0)).log_softmax(0)[target]


def gaussian_nll(f: Tensor, target: Tensor) -> Tensor:
    return -torch.distributions.Normal(f, NOISE).log_prob(target).sum()


def observed(data: list[Example], likelihood: Likelihood, precision: float) -> tuple[Tensor, Observations]:
    """As the rows have it: the kernel, and blocks of examples of equal size."""
    layout = Layout(torch.tensor(SIZES))
    rows = torch.cat([each.jacobian for each in data])
    prior, targets = (
        [torch.stack([getattr(data[n], part) for n in block]) for block in layout.examples]
        for part in ("prior", "target")
    )
    return rows @ rows.mT, Observations(layout, likelihood, prior, targets, precision)


KINDS = {
    "classification": (True, softmax_nll, Categorical(), 1.0),
    "regression": (False, gaussian_nll, Gaussian(), NOISE**-2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_optimum_and_what_is_left_without_each_example(kind: str) -> None:
    classification, nll, likelihood, precision = KINDS[kind]
    data = examples(classification)

    def loss(w: Tensor, of: list[Example] = data) -> Tensor:
        return 0.5 * (w * w).sum() + sum(nll(each.functions(w), each.target) for each in of)

    w = optimum(loss)
    hessian = torch.func.hessian(loss)(w)
    kernel, observations = observed(data, likelihood, precision)
    mode = newton(kernel, observations)
    assert_close(mode.functions, torch.cat([each.functions(w) for each in data]), 1e-9)
    assert_close(torch.cat([each.jacobian for each in data]).mT @ mode.alpha, w, 1e-8)
    evidence = -loss(w) - 0.5 * torch.linalg.slogdet(hessian).logabsdet
    assert mode.log_evidence == pytest.approx(float(evidence), rel=1e-9)
    found = leave_one_out(kernel, observations, mode)
    for block, (mean, cov) in zip(observations.layout.examples, found, strict=True):
        for place, n in enumerate(block.tolist()):
            rest, alone = data[:n] + data[n + 1 :], data[n]
            # One Newton step away from the optimum of all: the second-order formula, and exact for Gaussians.
            curvature = torch.func.hessian(lambda w, rest=rest: loss(w, rest))(w)
            step = torch.linalg.solve(curvature, torch.func.grad(lambda w, rest=rest: loss(w, rest))(w))
            assert_close(mean[place], alone.functions(w - step), 1e-8)
            expected = alone.jacobian @ torch.linalg.solve(curvature, alone.jacobian.mT)
            assert_close(cov[place], expected, 1e-8)
            if not classification:
                retrained = optimum(lambda w, rest=rest: loss(w, rest))
                assert_close(mean[place], alone.functions(retrained), 1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_examples_that_determine_next_to_nothing_are_left_out_by_their_own_columns(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways give the same where both can, in pieces too; and where W vanishes there is the posterior itself."""
    classification, _, likelihood, precision = KINDS[kind]
    kernel, observations = observed(examples(classification), likelihood, precision)
    mode = newton(kernel, observations)
    plain = leave_one_out(kernel, observations, mode)
    monkeypatch.setattr("laplace_lora_fast.structures.rows.solver.WIDTH", 4)
    pieces = leave_one_out(kernel, observations, mode)
    monkeypatch.setattr("laplace_lora_fast.structures.rows.refits.left_out._SEEN", 2.0)  # all of them
    own = leave_one_out(kernel, observations, mode)
    weighted = leave_one_out(kernel / 0.3, observations, mode, 0.3)
    for others in (pieces, own, weighted):
        for one, other in zip(plain, others, strict=True):
            assert_close(other[0], one[0], 1e-9)
            assert_close(other[1], one[1], 1e-9)
    monkeypatch.setattr("laplace_lora_fast.structures.rows.refits.left_out._SEEN", 1e-7)
    blocks = [block.clone() for block in mode.roots.blocks]
    blocks[0][0] = 0
    roots = BlockDiagonal(observations.layout, blocks)
    ((_, cov), *_) = leave_one_out(kernel, observations, replace(mode, roots=roots))
    weights = torch.linalg.inv(torch.eye(len(kernel)) + roots.whiten(kernel))
    posterior = kernel - roots.transposed_times(kernel).mT @ weights @ roots.transposed_times(kernel)
    place = observations.layout.rows[0][0]
    assert_close(cov[0], posterior[place[:, None], place], 1e-9)


def optimum(loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Newton's method over all weights; the losses here are convex and tame."""
    w = torch.zeros(PARAMETERS, dtype=torch.float64)
    for _ in range(50):
        step = torch.linalg.solve(torch.func.hessian(loss)(w), torch.func.grad(loss)(w))
        while loss(w - step) > loss(w) + 1e-9:
            step = step / 2
        w = w - step
    assert torch.func.grad(loss)(w).abs().max() < 1e-10
    return w
