"""A model that sees images: the vision tower is refused by name, `layers` is the way out."""

from __future__ import annotations

import pytest

from laplace_lora_fast import InvalidBatchError
from tests.matrix import multimodal, oracle


@pytest.mark.parametrize(
    ("targets", "language_only"),
    [(multimodal.LANGUAGE, False), ("all-linear", True)],
    ids=["by target", "by layers"],
)
def test_language_model(targets, language_only):
    assert multimodal.image_error(multimodal.llava, targets, language_only) < oracle.FP64


@pytest.mark.parametrize("targets", ["all-linear", r".*vision_tower.*q_proj"])
def test_vision_tower_is_refused_by_name(targets):
    with pytest.raises(InvalidBatchError, match=r"vision_tower.*layers="):
        multimodal.image_error(multimodal.llava, targets)
