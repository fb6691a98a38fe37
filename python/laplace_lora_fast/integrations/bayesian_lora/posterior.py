"""Evidence, Jacobians and logit covariance from Kronecker factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora_fast.fitting.passes import BatchStep, Subject, run
from laplace_lora_fast.integrations.bayesian_lora.factors import Factors
from laplace_lora_fast.integrations.linear import ParameterJacobians
from laplace_lora_fast.likelihoods import Gaussian
from laplace_lora_fast.model.batches import without_labels
from laplace_lora_fast.model.heads import OutputHead
from laplace_lora_fast.model.linear import locate
from laplace_lora_fast.model.lora import lora_layers


def model_evidence(
    model: nn.Module,
    LL: Tensor,
    factors: Factors,
    n_lora: int,
    n_kfac: int,
    s2: Tensor,
    *,
    compat: bool = False,
) -> Tensor:
    """Laplace's estimate of the log marginal likelihood, differentiable in s2.

    Args:
        model: holds the weights of the factors' layers.
        LL: log-likelihood of the training data.
        factors: after `cholesky_decompose_small_factors`.
        n_lora: LoRA rank.
        n_kfac: columns of the low-rank factors.
        s2: prior variance, scalar or [1].
        compat: bayesian-lora's number, which does not have a maximum where the evidence has.
    """
    logdet = torch.zeros((), dtype=torch.float64, device=s2.device)
    size = 1
    for A, S in factors.values():
        L, B = _small_and_large(A, S, n_lora, n_kfac)
        values = torch.outer(_gram_values(B), _gram_values(L)).to(s2.device)
        logdet = logdet + (s2 * values).log1p().sum()
        size = max(A.shape + S.shape)
    weights = [model.get_parameter(f"{name}.weight").detach().double() for name in factors]
    squares = torch.stack([weight.square().sum().to(s2.device) for weight in weights])
    if compat:
        evidence: Tensor = LL + squares.sqrt().sum() / s2 + (logdet - n_lora * size * s2.log()) / 2
    else:
        evidence = LL - squares.sum() / (2 * s2) - logdet / 2
    return evidence


def jacobian_mean(
    model: nn.Module,
    batch_inputs: Mapping[str, Any],
    target_ids: Tensor | None = None,
    is_s2s: bool = False,
    output_callback: Callable[[Any], Tensor] | None = None,
    *,
    compat: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """Jacobians of the logits with respect to the active adapter's LoRA weights; C backward passes.

    Args:
        model: a PEFT model.
        batch_inputs: what `model(**batch_inputs)` takes.
        target_ids: outputs to select, [C]; None for all.
        is_s2s: the model's logits are [N, C] already.
        output_callback: instead: model output -> logits [N, C].
        compat: logits of the last column instead of the last real position.

    Returns:
        {parameter name: [N, C, *parameter.shape]} and logits [N, C].

    Raises:
        UnsupportedAdapterError: the model has no LoRA layer that this package treats.
        InvalidBatchError: the logits are not [N, C], or depend on padded positions.
    """

    def output_fn(output: Any, inputs: Mapping[str, Any]) -> Tensor:
        if output_callback is not None:
            return output_callback(output)
        logits: Tensor = output.logits
        if not is_s2s:
            logits = logits[torch.arange(len(logits)), -1 if compat else _last_real(inputs, logits)]
        return logits if target_ids is None else logits[:, target_ids.flatten()]

    head = OutputHead(model, output_fn)
    names = [name for layer in lora_layers(model, head) for name in layer.parameter_names.values()]
    parameters = [model.get_parameter(name) for name in names]
    layers, places = locate(model, parameters)
    rows: list[list[Tensor]] = [[] for _ in names]
    steps: list[BatchStep] = []
    jacobians = ParameterJacobians(
        places,
        lambda step: step.functions.plain(step.u),
        lambda parameter, k, jacobian: rows[parameter].append(jacobian),
    )
    run(
        Subject(model, head, layers, Gaussian()),
        [without_labels(batch_inputs)],
        jacobians,
        steps.append,
        generator=torch.Generator(),
        plain_outputs=True,
    )
    logits = steps[0].u
    n, classes = logits.shape
    jacobian = {
        name: torch.stack(values, 1).reshape(n, classes, *parameter.shape)
        if values
        else parameter.new_zeros(n, classes, *parameter.shape)
        for name, parameter, values in zip(names, parameters, rows, strict=True)
    }
    return jacobian, logits


def variance(
    inputs: Any,
    jacobian: Mapping[str, Tensor],
    factors: Factors,
    s2: Tensor,
    n_logits: int,
    n_lora: int,
    n_kfac: int,
    device: str | torch.device,
) -> Tensor:
    """Covariance of the logits of the linearised model; bayesian-lora's numbers and the correct ones are the same.

    Args:
        inputs: unused, as the Jacobian knows the batch size.
        jacobian: from `jacobian_mean`.
        factors: after `cholesky_decompose_small_factors`.
        s2: prior variance.
        n_logits: C.
        n_lora: LoRA rank.
        n_kfac: columns of the low-rank factors.
        device: of the result.

    Returns:
        [N, C, C].

    Raises:
        ValueError: a factor has no Jacobian, or its shape is not that of n_lora and n_kfac.
    """
    total: Tensor | None = None
    for name, (A, S) in factors.items():
        small, large = _small_and_large(A, S, n_lora, n_kfac)
        G = _jacobian_of(name, jacobian).double()
        G = G if small is A else G.mT  # [N, C, d, r]
        L, B, prior = (part.to(G) for part in (small, large, s2))
        b, Q = torch.linalg.eigh(B.mT @ B)
        t, R = torch.linalg.eigh(L.mT @ L)
        projected = ((B @ Q).mT @ G @ (L @ R)).flatten(2)  # [N, C, k r]
        weights = 1 / (1 + prior * torch.outer(b, t).flatten())
        flat = G.flatten(2)
        block = prior * flat @ flat.mT - prior**2 * (projected * weights) @ projected.mT
        total = block if total is None else total + block
    if total is None or total.shape[1] != n_logits:
        raise ValueError(
            f"the Jacobian has {None if total is None else total.shape[1]} logits, expected {n_logits}"
        )
    return total.to(device, next(iter(jacobian.values())).dtype)


def _small_and_large(A: Tensor, S: Tensor, n_lora: int, n_kfac: int) -> tuple[Tensor, Tensor]:
    """The roots (L [n_lora, n_lora], B [d, n_kfac]) of a layer."""
    small, large = (A, S) if A.shape == (n_lora, n_lora) else (S, A)
    if small.shape != (n_lora, n_lora) or large.shape[-1] != n_kfac:
        raise ValueError(
            f"factors of shapes {tuple(A.shape)} and {tuple(S.shape)} do not fit n_lora={n_lora}, n_kfac={n_kfac}"
        )
    return small, large


def _gram_values(root: Tensor) -> Tensor:
    """Eigenvalues of root root^T that are not structurally zero."""
    values: Tensor = torch.linalg.svdvals(root.double())
    return values.square()


def _jacobian_of(name: str, jacobian: Mapping[str, Tensor]) -> Tensor:
    weight = name + ".weight"
    found = [key for key in jacobian if key == weight or key.endswith("." + weight)]
    if len(found) != 1:
        raise ValueError(f"factor {name!r} matches {len(found)} of the Jacobian's parameters")
    return jacobian[found[0]]


def _last_real(inputs: Mapping[str, Any], logits: Tensor) -> Tensor | int:
    mask = inputs.get("attention_mask")
    return -1 if mask is None else mask.cumsum(1).argmax(1).to(logits.device)
