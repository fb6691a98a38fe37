"""The prior precision by leaving out one training example at a time."""

from __future__ import annotations

import math

import pytest
from torch import Tensor, nn

from laplace_lora_fast import Classes, LaplaceLoRA, LaplaceWarning, LeaveOneOut, Rows
from tests import tiny


def loo_nll(la: LaplaceLoRA, labels: Tensor) -> float:
    ((_, mean, cov, _),) = la.posterior.curvature.leave_one_out(la.posterior.prior_precision)
    mean, cov = mean[:, 0], cov[:, 0, 0]
    signs = 2.0 * labels - 1
    return float(-nn.functional.logsigmoid(signs * mean / (1 + math.pi / 8 * cov).sqrt()).mean())


def test_loo_takes_the_best_of_the_grid() -> None:
    data, grid = (
        tiny.batch(7, length=6, seed=1, padding="right", classes=2),
        [1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2],
    )
    model = tiny.tiny_llama_classifier(2)
    la = LaplaceLoRA(model, Classes(), structure=Rows(refit=True)).fit([data], progress=False)
    found = {}
    for la.prior_precision in grid:
        found[la.prior_precision] = loo_nll(la, data["labels"])
    expected = min(found, key=found.__getitem__)
    if expected in (grid[0], grid[-1]):
        with pytest.warns(LaplaceWarning, match="edge"):
            assert la.optimize_prior_precision(LeaveOneOut(grid=grid), progress=False) == expected
    else:
        assert la.optimize_prior_precision(LeaveOneOut(grid=grid), progress=False) == expected
    assert la.prior_precision == expected
