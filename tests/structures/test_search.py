"""The search that the evidence is maximised by."""

from __future__ import annotations

import math

import pytest

from laplace_lora_fast import NumericalError
from laplace_lora_fast.structures.search import increasing_root, maximum_on_log_axis


@pytest.mark.parametrize("root", [-80.0, 0.0, 3.3, 90.0])
def test_increasing_root(root: float) -> None:
    """Newton from far away on a function that is flat on one side and steep on the other."""
    found = increasing_root(lambda x: (math.expm1(min(x - root, 700)), math.exp(min(x - root, 700))), 0.0)
    assert found == pytest.approx(root, abs=1e-9)


def test_a_function_without_a_root_is_refused() -> None:
    with pytest.raises(NumericalError, match="no maximum"):
        increasing_root(lambda x: (-1.0, 0.0), 0.0)


@pytest.mark.parametrize("best", [3e-6, 0.04, 7.0, 2e7])
def test_a_maximum_is_found_by_a_third_of_what_a_grid_would_take(best: float) -> None:
    """Flat far above, steep below, as an evidence is."""
    seen: list[float] = []

    def evidence(lam: float) -> float:
        seen.append(lam)
        ratio = lam / best
        return -3 * math.log1p(1 / ratio) - math.log1p(ratio) * 3 / (1 + 1e-3 * math.log(ratio) ** 2)

    found = maximum_on_log_axis(evidence, 1e-6, 1e8)
    step = 1e-4
    up, down = (evidence(found * math.exp(each)) for each in (step, -step))
    assert abs(up - down) / (2 * step) < 1e-6
    assert len(seen) - 2 <= 35


def test_a_maximum_at_an_end_is_refused() -> None:
    for sign in (1, -1):
        with pytest.raises(NumericalError, match="between 1e-06 and 1e\\+08"):
            maximum_on_log_axis(lambda lam, sign=sign: sign * math.log(lam), 1e-6, 1e8)  # type: ignore[misc]
