"""What every method's result is measured against: the tests' oracle, one unpadded example at a time, sums in fp64.

Curvature is a list of (input factor, gradient factor), fp64, for lora_A and lora_B of every layer in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cache

import torch
from torch import Tensor, nn

from bench.models import Batch, Setting
from tests import oracle

Curvature = list[tuple[Tensor, Tensor]]

PRIOR_PRECISION = 1.0  # of every comparison
COTANGENTS = {"exact": oracle.exact_cotangents, "empirical": oracle.empirical_cotangents}


@cache
def curvature(setting: Setting, kfac: str, fisher: str = "exact") -> Curvature:
    """KFAC of the training set.

    Args:
        setting: model and data.
        kfac: "reduce"; "expand", the input factor a mean over all tokens; "expand by example", a mean over examples of
            means over their tokens, which is laplace-torch's for each example alone.
        fisher: "exact", or "empirical": the labels of the data.
    """
    streams = [
        ([x.double() for x in inputs], gradients)
        for stream in _streams(setting, fisher)
        for inputs, gradients in ((stream.x, stream.g_a), (stream.z, stream.g_b))
    ]
    if kfac == "expand by example":
        means = [sum(x.mT @ x / len(x) for x in inputs) / len(inputs) for inputs, _ in streams]
        return [(x, g) for x, (_, g) in zip(means, curvature(setting, "expand", fisher), strict=True)]
    return [oracle.kfac(inputs, [g.double() for g in gradients], kfac) for inputs, gradients in streams]


@cache
def jacobian(setting: Setting) -> Tensor:
    """[N, C, P] of the first batch: all weights of the adapter, by autograd."""
    found = oracle.jacobians(setting.model, setting.loader[0], _logits_of(setting))
    return torch.cat(list(found.values()), 2)


def variance(setting: Setting, kfac: str | None) -> Tensor:
    """Variances [N, C - 1] of f_c - f_0 in the first batch; under the GGN itself for kfac = None."""
    if kfac is not None:
        return _spectral(setting, kfac)[0]
    rows, contrasts = _ggn_rows(setting), _contrasts(setting).flatten(0, 1)
    identity = PRIOR_PRECISION * torch.eye(len(rows), dtype=torch.float64)
    seen = torch.linalg.solve(identity + rows @ rows.mT, rows @ contrasts.mT)
    left = contrasts.square().sum(1) - (seen * (rows @ contrasts.mT)).sum(0)
    return (left / PRIOR_PRECISION).view(_contrasts(setting).shape[:2])


@cache
def ggn_eigenvalues(setting: Setting) -> Tensor:
    """Of the GGN in all weights: as many as its examples have outputs, descending."""
    rows = _ggn_rows(setting)
    return torch.linalg.eigvalsh(rows @ rows.mT).flip(0)


def evidence(setting: Setting, kfac: str, prior_precision: float = PRIOR_PRECISION) -> float:
    """Laplace's log marginal likelihood of the training set."""
    (likelihood, norm), (_, values) = _likelihood_and_norm(setting), _spectral(setting, kfac)
    return likelihood - float(prior_precision * norm + (values / prior_precision).log1p().sum()) / 2


@cache
def best_evidence(setting: Setting, kfac: str) -> float:
    """Its maximum over the prior precision, by ternary search: in log lambda it has one."""
    low, high = -8.0, 8.0
    for _ in range(60):
        left, right = (2 * low + high) / 3, (low + 2 * high) / 3
        if evidence(setting, kfac, 10**left) < evidence(setting, kfac, 10**right):
            low = left
        else:
            high = right
    return evidence(setting, kfac, 10**low)


def distance(found: Curvature, expected: Curvature) -> float:
    """Relative distance of two curvatures in the Frobenius norm of all their blocks gradient (x) input."""
    square, norm = 0.0, 0.0
    for (x, g), (y, h) in zip(found, expected, strict=True):
        x, g = x.double(), g.double()
        # x (x) g - y (x) h = (x - y) (x) g + y (x) (g - h), so that nothing cancels
        dx, dg = x - y, g - h
        square += float(_dot(dx, dx) * _dot(g, g) + _dot(y, y) * _dot(dg, dg) + 2 * _dot(dx, y) * _dot(g, dg))
        norm += float(_dot(y, y) * _dot(h, h))
    return (square / norm) ** 0.5


def relative(found: Tensor | float, expected: Tensor | float) -> float:
    """Relative distance of two tensors or numbers."""
    a, b = (torch.as_tensor(value, dtype=torch.float64).detach() for value in (found, expected))
    return float((a - b).norm() / b.norm())


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


@cache
def _streams(setting: Setting, fisher: str) -> list[oracle.Stream]:
    """Of every LoRA layer over the training set."""
    batches = [
        oracle.streams(setting.model, batch, _logits_of(setting), COTANGENTS[fisher])
        for batch in setting.loader
    ]
    keys = [field.name for field in fields(oracle.Stream)]
    return [
        oracle.Stream(*([row for part in parts for row in getattr(part, key)] for key in keys))
        for parts in zip(*(batch.values() for batch in batches), strict=True)
    ]


@cache
def _spectral(setting: Setting, kfac: str) -> tuple[Tensor, Tensor]:
    """What takes eigendecompositions: the contrasts' variances [N, C - 1] and the eigenvalues of the curvature."""
    contrasts = _contrasts(setting)
    total, values, start = torch.zeros(contrasts.shape[:2], dtype=torch.float64), [], 0
    for x, g in curvature(setting, kfac):
        (x_values, X), (g_values, G) = torch.linalg.eigh(x), torch.linalg.eigh(g)
        values.append(torch.outer(g_values.clamp_min(0), x_values.clamp_min(0)))
        block = contrasts[:, :, start : start + values[-1].numel()].unflatten(2, values[-1].shape)
        total += ((G.mT @ block @ X).square() / (values[-1] + PRIOR_PRECISION)).sum((2, 3))
        start += values[-1].numel()
    return total, torch.cat([part.flatten() for part in values])


def _contrasts(setting: Setting) -> Tensor:
    """[N, C - 1, P], fp64, of the first batch."""
    plain = jacobian(setting)
    return (plain[:, 1:] - plain[:, :1]).double()


@cache
def _ggn_rows(setting: Setting) -> Tensor:
    """Phi [N C, P] fp64 of the training set, the GGN being Phi^T Phi."""
    weights = [
        torch.cat(
            [
                torch.einsum("kto,ti->koi", g.double(), x.double()).flatten(1)
                for x, g in zip(inputs, gradients, strict=True)
            ]
        )
        for stream in _streams(setting, "exact")
        for inputs, gradients in ((stream.x, stream.g_a), (stream.z, stream.g_b))
    ]
    return torch.cat(weights, 1)


@cache
def _likelihood_and_norm(setting: Setting) -> tuple[float, float]:
    """Log-likelihood of the training set, and squared norm of the weights."""
    weights = [
        parameter.detach().double() for parameter in setting.model.parameters() if parameter.requires_grad
    ]
    with torch.no_grad():
        logs = [
            -nn.functional.cross_entropy(
                _logits_of(setting)(setting.model, single)[None].double(), single["labels"]
            )
            for batch in setting.loader
            for single in oracle.examples(batch)
        ]
    return float(torch.stack(logs).sum()), sum(float(weight.square().sum()) for weight in weights)


def _logits_of(setting: Setting) -> Callable[[nn.Module, Batch], Tensor]:
    return lambda model, single: model(input_ids=single["input_ids"], logits_to_keep=1).logits[
        0, -1, setting.answers
    ]
