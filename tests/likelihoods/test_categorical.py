"""The softmax likelihood against direct computation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laplace_lora_fast.errors import DeferredChecks
from laplace_lora_fast.likelihoods import Categorical


@settings(max_examples=50, deadline=None)
@given(classes=st.integers(2, 7), scale=st.floats(0, 30), seed=st.integers(0, 1000))
def test_hessian_root_has_rank_c_minus_1_and_the_right_square(classes: int, scale: float, seed: int) -> None:
    logits = scale * torch.randn(
        3, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    p = logits.softmax(1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    root = Categorical().hessian_root(logits)
    assert root.shape == (3, classes, classes - 1)
    torch.testing.assert_close(root @ root.mT, expected, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("favourite", [0, 1])
def test_hessian_root_keeps_its_digits_for_confident_predictions(classes: int, favourite: int) -> None:
    """fp32, p within 1e-13 of one: diag(p) - p p^T would be all rounding."""
    logits = torch.zeros(1, classes)
    logits[0, favourite] = 30.0
    q = (-30.0 + math.log(classes - 1)) if classes > 2 else -30.0
    root = Categorical().hessian_root(logits).double()
    variance = (root @ root.mT)[0, favourite, favourite].item()
    assert variance == pytest.approx(math.exp(q), rel=1e-4)  # p (1 - p)


def test_targets_are_copies() -> None:
    """A loader may fill the same memory with the next batch."""
    labels = torch.tensor([0, 1, 1])
    targets = Categorical().targets(labels, torch.zeros(3, 2), DeferredChecks())
    labels.zero_()
    assert targets.tolist() == [0, 1, 1]


def test_score_of_a_sure_and_wrong_label():
    """The softmax of an fp32 margin of 120 is 0: its logarithm would be infinite under every prior."""
    mean, cov = torch.tensor([[120.0]]), torch.full((1, 1, 1, 1), 1e-12)
    score, _ = Categorical().score(mean, cov, torch.tensor([0]), "probit", 10, torch.Generator(), None)
    torch.testing.assert_close(score, torch.tensor([120.0], dtype=torch.float64))
