"""The exact linearised Laplace posterior by plain autograd: one sequence at a time, no hooks, no batching.

transformers rounds norms, softmax and rotary angles to fp32 inside fp64 models: two shapes of one computation then
agree to about 1e-6, here as in the package. So a cell of an fp64 model is right below `FP64`; a layer that is missing,
counted twice or read at a pad is off by percents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

FP64 = 1e-5
FP32 = 1e-3

Outputs = Callable[[nn.Module, Any], Tensor]  # (model, one sequence) -> u [C]


def lora_weights(model: nn.Module, layers: Callable[[str], bool] = lambda name: True) -> list[nn.Parameter]:
    """A and B of every LoRA layer with an active adapter, and the linear layers that are trained beside it."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and layers(name):
            for adapter in module.active_adapters:
                if adapter in module.lora_A:
                    found += [module.lora_A[adapter].weight, module.lora_B[adapter].weight]
        elif type(module) is nn.Linear and ".modules_to_save." in name and layers(name):
            found += module.parameters(recurse=False)
    return found


def jacobian(
    model: nn.Module, outputs: Outputs, example: Any, weights: Sequence[nn.Parameter]
) -> tuple[Tensor, Tensor]:
    """Outputs [C] and their Jacobian [C, P], fp64."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False) if parameter.is_floating_point() else None
    for weight in weights:
        weight.requires_grad_(True)
    try:
        u = outputs(model, example)
        rows = []
        for output in u:
            gradients = torch.autograd.grad(output, weights, retain_graph=True, allow_unused=True)
            found = [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, weights, strict=True)]
            rows.append(torch.cat([g.flatten().double() for g in found]))
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag) if parameter.is_floating_point() else None
    return u.detach().double(), torch.stack(rows)


def posterior(
    model: nn.Module,
    outputs: Outputs,
    train: Sequence[Any],
    test: Sequence[Any],
    weights: Sequence[nn.Parameter] | None = None,
    noise: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean [M, C] and covariance [M, C, C] of the test outputs at prior precision 1.

    Args:
        model: the model, left in evaluation mode.
        outputs: (model, one sequence) -> u.
        train: sequences.
        test: sequences.
        weights: those with a posterior; None for all LoRA weights.
        noise: of a Gaussian likelihood; None for softmax.
    """
    model.eval()
    weights = lora_weights(model) if weights is None else weights
    rows = []
    for example in train:
        u, jac = jacobian(model, outputs, example, weights)
        p = u.softmax(-1)
        hessian = (
            torch.diag(p) - torch.outer(p, p) if noise is None else torch.eye(len(u)).double() / noise**2
        )
        values, vectors = torch.linalg.eigh(hessian)
        rows.append((vectors * values.clamp(min=0).sqrt()).T @ jac)
    phi = torch.cat(rows)
    root = torch.linalg.cholesky(phi @ phi.T + torch.eye(len(phi)).double())
    means, covariances = [], []
    for example in test:
        u, jac = jacobian(model, outputs, example, weights)
        known = torch.linalg.solve_triangular(root, phi @ jac.T, upper=False)
        means.append(u)
        covariances.append(jac @ jac.T - known.T @ known)
    return torch.stack(means), torch.stack(covariances)


def error(found: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest entry; an oracle of zeros proves nothing."""
    found, expected = found.detach().double(), expected.double()
    assert found.shape == expected.shape, f"{tuple(found.shape)}, expected {tuple(expected.shape)}"
    scale = float(expected.abs().max())
    assert scale > 0, "the oracle is zero"
    deviation = float((found - expected).abs().max()) / scale
    return float("inf") if deviation != deviation else deviation
