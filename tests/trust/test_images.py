"""A model that sees images, whose vision tower has patches, not tokens."""

from __future__ import annotations

import pytest

from laplace_lora_fast import KFAC, InvalidBatchError
from tests.matrix import multimodal, oracle


@pytest.mark.parametrize(
    ("targets", "language_only"),
    [(multimodal.LANGUAGE, False), ("all-linear", True)],
    ids=["by target", "by layers"],
)
def test_language_model(targets, language_only):
    assert multimodal.image_error(multimodal.llava, targets, language_only) < oracle.FP64


@pytest.mark.parametrize("targets", ["all-linear", r".*vision_tower.*q_proj"])
def test_vision_tower(targets):
    """Its patches are no tokens of the text: rows by autograd."""
    assert multimodal.image_error(multimodal.llava, targets) < oracle.FP64


def test_kfac_refuses_a_vision_tower_by_name():
    with pytest.raises(InvalidBatchError, match=r"vision_tower.*layers="):
        multimodal.image_error(multimodal.llava, "all-linear", structure=KFAC())
