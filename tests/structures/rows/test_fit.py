"""How the rows of a fit are kept."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from laplace_lora_fast import Classes, LaplaceLoRA, NumericalError, Rows
from laplace_lora_fast.likelihoods import Categorical
from laplace_lora_fast.likelihoods.functions import OneSequence
from laplace_lora_fast.structures.rows.fit import RowAccumulator
from laplace_lora_fast.weights import LoraWeights
from tests.oracle import assert_close
from tests.structures.dense import TEST, fitted, model_of


def test_rows_move_to_disk_when_they_exceed_the_budget() -> None:
    model = model_of(3)
    roomy, tight = fitted(model, "rows"), fitted(model, Rows(), budget=4096)
    files = [
        [rows.untyped_storage().filename for rows in la.posterior.curvature.rows] for la in (roomy, tight)
    ]
    assert not any(files[0])
    assert all(files[1])
    assert_close(tight.logit_distribution(TEST)[1], roomy.logit_distribution(TEST)[1], 1e-12)
    assert tight.log_marginal_likelihood().item() == pytest.approx(
        roomy.log_marginal_likelihood().item(), rel=1e-12
    )


class Step:
    """A batch of two examples of three classes, as far as rows look at it."""

    shared_inputs = ()
    targets = None

    def __init__(self) -> None:
        self.u = torch.zeros(2, 3, dtype=torch.float64)
        self.outputs = [self.u]
        self.functions = OneSequence(2, Categorical().functions(3))


def accumulator() -> tuple[RowAccumulator, list[LoraWeights]]:
    layers = [layer.weights for layer in LaplaceLoRA(model_of(3), Classes()).layers]
    return RowAccumulator(layers, Categorical(), "exact", columns=4, budget=10**6, seed=0), layers


def streams(layer: LoraWeights, value: float = 1.0) -> tuple[Tensor, Tensor]:
    small = torch.ones(2, 1, 3, layer.rank, dtype=torch.float64)
    return small, torch.full((2, 1, 3, layer.d_in), value, dtype=torch.float64)


def test_rows_that_are_not_finite_are_refused() -> None:
    rows, layers = accumulator()
    rows.start(Step())
    for _ in range(2):
        rows.observe_jacobian(0, *streams(layers[0], torch.inf))
        rows.finish_pass()
    rows.finish()
    with pytest.raises(NumericalError, match=re.escape(layers[0].name)):
        rows.result()


def test_rows_of_layers_a_pass_does_not_reach_are_zero() -> None:
    """So that rows of all layers stay aligned."""
    rows, layers = accumulator()
    rows.start(Step())
    for index in range(2):
        rows.observe_jacobian(2 * index, *streams(layers[0]))
        rows.finish_pass()
    rows.finish()
    matrices = rows.result().rows  # of each example, the first pass and the second
    assert all(len(matrix) == 4 for matrix in matrices)
    assert matrices[0][0::2].abs().min() > 0
    assert matrices[0][1::2].abs().max() == 0
    assert matrices[2][0::2].abs().max() == 0
    assert matrices[2][1::2].abs().min() > 0
    assert matrices[1].abs().max() == 0
