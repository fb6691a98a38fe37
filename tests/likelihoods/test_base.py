"""What all likelihoods promise of their derivatives and samples."""

from __future__ import annotations

import pytest
import torch

from laplace_lora_fast.likelihoods import Categorical, Gaussian, Likelihood, MonteCarlo
from laplace_lora_fast.likelihoods.fisher import fisher_cotangents


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian()])
def test_sampled_cotangents_have_the_hessian_as_second_moment(likelihood: Likelihood) -> None:
    seeded = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, generator=seeded, dtype=torch.float64)
    root = likelihood.hessian_root(logits)
    drawn = fisher_cotangents(likelihood, MonteCarlo(20_000), logits, None, seeded)
    torch.testing.assert_close(drawn @ drawn.mT, root @ root.mT, atol=0.03, rtol=0.05)


def test_residual_is_the_gradient_of_the_negative_log_likelihood() -> None:
    for likelihood, targets in (
        (Categorical(), torch.tensor([2, 0])),
        (Gaussian(), torch.randn(2, 3).double()),
    ):
        logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(-likelihood.log_likelihood(logits, targets), logits)
        torch.testing.assert_close(likelihood.residual(logits.detach(), targets), expected)


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian()])
def test_functions_are_all_that_a_likelihood_sees(likelihood: Likelihood) -> None:
    """Outputs made of the functions alone have the same derivatives, and the Hessian in the functions is its own."""
    outputs = torch.randn(4, 3, dtype=torch.float64)
    directions = likelihood.functions(3).double()
    values = (outputs @ directions).requires_grad_()
    rebuilt = likelihood.from_functions(values)
    root, own = likelihood.hessian_root(outputs), likelihood.hessian_root(rebuilt.detach())
    torch.testing.assert_close(own @ own.mT, root @ root.mT)
    targets = likelihood.sample(outputs, torch.Generator().manual_seed(0))

    def loss(each: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return -likelihood.log_likelihood(likelihood.from_functions(each[None]), target[None])

    expected = torch.stack(
        [
            torch.autograd.functional.hessian(lambda v, t=target: loss(v, t), each)
            for each, target in zip(values.detach(), targets, strict=True)
        ]
    )
    root = likelihood.functions_root(outputs)
    torch.testing.assert_close(root @ root.mT, expected)
