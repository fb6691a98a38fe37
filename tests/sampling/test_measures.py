"""Measures of tokens and sequences against their definitions, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from laplace_lora_fast.sampling.measures import TokenUncertainty, measured, placed


def uncertainty(n: int = 4) -> tuple[Tensor, Tensor, Tensor, TokenUncertainty]:
    """Probabilities [n, N, T, V], tokens, mask, and what is made of them."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, 3, 5, 7, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 7, (3, 5), generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    return logits.softmax(-1), tokens, mask, placed(measured(logits, tokens), tokens, mask)


def test_tokens() -> None:
    p, tokens, mask, found = uncertainty()
    n = len(p)
    for row, place in mask.nonzero().tolist():
        each = p[:, row, place]
        mixture = each.mean(0)

        def entropy(q: Tensor) -> Tensor:
            return -(q * q.log()).sum()

        def kl(a: Tensor, b: Tensor) -> Tensor:
            return (a * (a.log() - b.log())).sum()

        at = row, place
        assert math.isclose(found.total[at], entropy(mixture))
        aleatoric = sum(entropy(q) for q in each) / n
        assert math.isclose(found.aleatoric[at], aleatoric)
        assert math.isclose(found.epistemic[at], sum(kl(q, mixture) for q in each) / n, rel_tol=1e-9)
        pairs = sum(kl(a, b) for a in each for b in each) / n**2
        assert math.isclose(found.epkl[at], pairs, rel_tol=1e-9)
        assert math.isclose(found.rmi[at], sum(kl(mixture, q) for q in each) / n, rel_tol=1e-9)
        assert math.isclose(found.nll[at], -mixture[tokens[at]].log())
    for values in (found.total, found.epistemic, found.epkl, found.rmi, found.nll, found.log_probs[0]):
        assert torch.equal(values.isnan(), ~mask)


@pytest.mark.parametrize("normalised", [False, True])
def test_sequences(normalised: bool) -> None:
    p, tokens, mask, found = uncertainty()
    whole = found.sequence(normalised)
    for row in range(3):
        length = int(mask[row].sum())
        scale = 1 / length if normalised else 1.0
        of_tokens = p[:, row, torch.arange(length), tokens[row, :length]]  # [n, L]
        products = of_tokens.prod(1)
        assert int(whole.length[row]) == length
        assert math.isclose(whole.nll[row], -scale * of_tokens.mean(0).prod().log(), rel_tol=1e-9)
        assert math.isclose(whole.joint_nll[row], -scale * products.mean().log(), rel_tol=1e-9)
        assert math.isclose(whole.expected_nll[row], -scale * products.log().mean(), rel_tol=1e-9)
        assert math.isclose(whole.log_prob_variance[row], scale**2 * products.log().var(), rel_tol=1e-9)
        assert math.isclose(whole.joint_rmi[row], whole.expected_nll[row] - whole.joint_nll[row])
        assert math.isclose(whole.token_rmi[row], whole.expected_nll[row] - whole.nll[row])
        for name in ("total", "aleatoric", "epistemic", "epkl", "rmi"):
            summed = getattr(found, name)[row, :length].sum() * scale
            assert math.isclose(getattr(whole, name)[row], summed, rel_tol=1e-9)
    assert (whole.joint_rmi >= 0).all()
    assert (whole.token_rmi >= 0).all()


def test_one_sample_knows_no_epistemic_uncertainty() -> None:
    _, _, mask, found = uncertainty(n=1)
    assert found.epistemic[mask].abs().max() < 1e-12
    assert found.epkl[mask].abs().max() < 1e-12
    assert found.sequence().log_prob_variance.isnan().all()


def test_sure_and_opposed_samples() -> None:
    """Finite where probabilities vanish: all of the uncertainty is epistemic."""
    logits = torch.tensor([[1e4, 0.0], [0.0, 1e4]]).view(2, 1, 1, 2)
    token = torch.zeros(1, 1, dtype=torch.long)
    found = placed(measured(logits, token), token, torch.ones(1, 1, dtype=torch.bool))
    assert math.isclose(found.total.item(), math.log(2), rel_tol=1e-6)
    assert found.aleatoric.item() == 0
    assert math.isclose(found.epistemic.item(), math.log(2), rel_tol=1e-6)
    assert found.epkl.isfinite().all()
