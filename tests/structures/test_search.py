"""The search that the evidence is maximised by."""

from __future__ import annotations

import math

import pytest

from laplace_lora_fast import NumericalError
from laplace_lora_fast.structures.search import increasing_root


@pytest.mark.parametrize("root", [-80.0, 0.0, 3.3, 90.0])
def test_increasing_root(root: float) -> None:
    """Newton from far away on a function that is flat on one side and steep on the other."""
    found = increasing_root(lambda x: (math.expm1(min(x - root, 700)), math.exp(min(x - root, 700))), 0.0)
    assert found == pytest.approx(root, abs=1e-9)


def test_a_function_without_a_root_is_refused() -> None:
    with pytest.raises(NumericalError, match="no maximum"):
        increasing_root(lambda x: (-1.0, 0.0), 0.0)
