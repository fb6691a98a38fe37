"""LoRA weights that were not trained, among others that were: said, and a way to leave them out that is exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace_lora_fast import EKFAC, KFAC, Classes, Diagonal, LaplaceLoRA, LaplaceWarning, Rows
from tests import tiny
from tests.model.taps import ANSWERS
from tests.oracle import softmax_hessian


def frozen(model, which):
    for name, parameter in model.named_parameters():
        if "lora" in name and which(name):
            parameter.requires_grad_(False)
    return model


def test_a_mixture_is_said():
    model = frozen(tiny.tiny_llama(), lambda name: "lora_A" in name)
    with pytest.warns(
        LaplaceWarning, match=r"4 of 8 LoRA weights do not require gradients, '[\w.]+lora_A"
    ) as caught:
        LaplaceLoRA(model, ANSWERS)
    assert caught[0].filename == __file__
    model = frozen(tiny.tiny_llama(), lambda name: "layers.0" in name)
    with pytest.warns(LaplaceWarning, match="layers="):
        LaplaceLoRA(model, ANSWERS)
    LaplaceLoRA(model, ANSWERS, layers="last")  # a warning would be an error
    LaplaceLoRA(tiny.tiny_llama(), ANSWERS)
    LaplaceLoRA(tiny.tiny_llama().requires_grad_(False), ANSWERS)  # as loaded for inference


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def jacobian(model, x, parameters):
    rows = [torch.autograd.grad(logit, parameters, retain_graph=True) for logit in model(x).flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).view(len(x), 3, -1)


@pytest.mark.filterwarnings("ignore::laplace_lora_fast.LaplaceWarning")
@pytest.mark.parametrize("structure", [Rows(), KFAC(), EKFAC(), Diagonal()], ids=str)
def test_a_large_prior_precision_leaves_a_side_out(structure):
    """To the exact posterior over lora_B alone; the other structures to their own, which no larger one changes."""
    model = tiny.adapt(Small(), targets=("first", "second"), r=2).eval()
    parameters = [p for name, p in model.named_parameters() if "lora_B" in name]
    train, test = (torch.randn(n, 5, dtype=torch.float64) for n in (6, 3))
    frozen(model, lambda name: "lora_A" in name)
    la = LaplaceLoRA(model, Classes(), structure=structure, prior_precision={"A": 1e12, "B": 0.7})
    la.fit([{"x": train}], progress=False)
    found = la.logit_distribution({"x": test})[1]
    j, logits = jacobian(model, train, parameters), model(train).detach()
    hessian = sum(each.mT @ softmax_hessian(logit) @ each for each, logit in zip(j, logits, strict=True))
    j_test = jacobian(model, test, parameters)
    covariance = torch.linalg.inv(hessian + 0.7 * torch.eye(len(hessian), dtype=torch.float64))
    expected = j_test @ covariance @ j_test.mT
    if isinstance(structure, Rows):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    else:
        larger = la.logit_distribution({"x": test}, prior_precision={"A": 1e14, "B": 0.7})[1]
        torch.testing.assert_close(found, larger, rtol=1e-8, atol=1e-9)
        ratio = found.diagonal(dim1=1, dim2=2).sum() / expected.diagonal(dim1=1, dim2=2).sum()
        assert 0.5 < ratio < 2
