"""Fitted posteriors to and from laplace-torch's `Kron` and `KronLaplace.state_dict()`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from laplace.utils import Kron
from torch import Tensor

from laplace_lora_fast.errors import NotFittedError, StateError
from laplace_lora_fast.fitting.fit import Fit
from laplace_lora_fast.laplace import LaplaceLoRA
from laplace_lora_fast.posterior import LayerFactors
from laplace_lora_fast.structures import KFAC
from laplace_lora_fast.structures.base import Ability, Structure
from laplace_lora_fast.structures.blocks.algebra import KronBlock
from laplace_lora_fast.structures.blocks.curvature import BlockCurvature
from laplace_lora_fast.structures.blocks.spectrum import Spectrum
from laplace_lora_fast.weights import (
    SIDES,
    by_layer,
    from_flat,
    long_side_is_input,
    matrices,
    to_flat,
    weight_names,
)


def to_kron(la: LaplaceLoRA) -> Kron:
    """The curvature of a fitted posterior at unit noise, as dense factors [gradient, input] of every LoRA weight.

    Args:
        la: fitted, structure=KFAC().

    Returns:
        Factors in the order of the model's LoRA parameters. Low-rank factors become dense, with their tail.

    Raises:
        ValueError: the structure is another one, or an adapted language-model head is fitted on its answer rows only,
            so it has no factor of all rows, or a trained head is among the layers.
        NotFittedError: before `fit`.
    """
    structure = la.snapshot()[0].structure
    if Ability.FACTORS not in structure.abilities:
        raise ValueError(f"{structure!r} gives no Kronecker product: fit with KFAC()")
    for layer in la.layers:
        if layer.features is not None:
            raise ValueError(
                f"layer {layer.name!r} is fitted on its answer rows only: it has no Kron of all rows"
            )
    pairs = []
    for name, factors in la.factors.items():
        if not isinstance(factors, LayerFactors):
            raise ValueError(
                f"{name!r} is a trained head, which laplace-torch has no factors of with its bias: leave it out with "
                'layers=lambda name: "modules_to_save" not in name'
            )
        both = [weight for weight in (factors.A, factors.B) if weight is not None]
        pairs += [[weight.gradient_factor, weight.input_factor] for weight in both]
    return Kron(pairs)


def to_state_dict(la: LaplaceLoRA) -> dict[str, Any]:
    """What `KronLaplace.load_state_dict` reads, for a `KronLaplace` over the same model's LoRA weights.

    Args:
        la: fitted on batches with labels.

    Raises:
        ValueError: as `to_kron`.
        NotFittedError: before `fit`, or fitted on batches without labels.
    """
    kron, (fit, centre) = to_kron(la), la.snapshot()
    if la.likelihood.has_noise and not la.likelihood.is_unit:
        raise ValueError("laplace-torch has one noise for all outputs: fit with Regression() without scales")
    if fit.log_likelihood is None:
        raise NotFittedError(
            "laplace-torch's state holds the training loss: fit with 'labels' in every batch"
        )
    posterior = la.posterior
    names, means = fit.curvature.names, fit.curvature.means
    like, prior = means[0], posterior.prior_precision.to(means[0])
    mean = [to_flat(name.side, value) for name, value in zip(names, means, strict=True)]
    return {
        "mean": torch.cat(mean),
        "H": kron.kfacs,
        "loss": like.new_tensor(-fit.log_likelihood),
        "prior_mean": like.new_zeros(())
        if centre is None
        else torch.cat(
            [
                to_flat(name.side, value.expand(mean.shape)).to(like)
                for name, value, mean in zip(names, centre, means, strict=True)
            ]
        ),
        "prior_precision": prior[:1] if bool((prior == prior[0]).all()) else prior,
        "sigma_noise": like.new_tensor(1.0 if la.sigma_noise is None else la.sigma_noise),
        "n_data": fit.n_examples,
        "n_outputs": fit.n_outputs,
        "likelihood": la.likelihood.name,
        "temperature": 1.0,
        "enable_backprop": False,
        "cls_name": "KronLaplace",
    }


def from_state_dict(la: LaplaceLoRA, state: Mapping[str, Any]) -> LaplaceLoRA:
    """Gives `la` the posterior in a `KronLaplace.state_dict()` over the same LoRA weights, as if it had been fitted.

    Args:
        la: over the same model and adapter, structure KFAC() or "auto"; its prior mean, prior precision and noise are
            overwritten.
        state: laplace-torch's.

    Returns:
        `la`.

    Raises:
        StateError: the state is of another class, likelihood or adapter, its temperature is not 1, or its prior
            precision is neither one number, one a layer, nor one for all lora_A and one for all lora_B.
        ValueError: `la` has another structure.
    """
    if isinstance(la.structure, Structure) and Ability.FACTORS not in la.structure.abilities:
        raise ValueError(f"laplace-torch's factors are those of KFAC(), not of {la.structure!r}")
    if (
        state["cls_name"] != "KronLaplace"
        or state["likelihood"] != la.likelihood.name
        or state["temperature"] != 1
    ):
        raise StateError(
            f"expected a KronLaplace of likelihood {la.likelihood.name!r} at temperature 1, got "
            f"{state['cls_name']}, {state['likelihood']!r}, {state['temperature']}"
        )
    names = weight_names(la.layers)
    weights = matrices(layer.weights for layer in la.layers)
    sizes = [weight.numel() for weight in weights]
    if len(state["H"]) != len(weights) or len(state["mean"]) != sum(sizes):
        raise StateError(
            f"the state has {len(state['H'])} factor pairs, the model {len(weights)} LoRA weights"
        )
    blocks = []
    for name, weight, factors, mean in zip(
        names, weights, state["H"], state["mean"].split(sizes), strict=True
    ):
        gradient, inputs = (factor.double() for factor in factors)
        large, small = (inputs, gradient) if long_side_is_input(name.side) else (gradient, inputs)
        if (len(small), len(large)) != tuple(weight.shape):
            raise StateError(f"layer {name.layer!r} has other shapes than the state's factors")
        matrix = from_flat(name.side, mean, tuple(weight.shape))
        blocks += KronBlock.kfac([(_spectrum(large, weight.dtype), small, matrix)])
    fit = Fit(
        structure=la.structure if isinstance(la.structure, Structure) else KFAC(),
        curvature=BlockCurvature(names, blocks),
        shared_inputs=list(range(len(la.layers))),
        n_examples=int(state["n_data"]),
        n_outputs=int(state["n_outputs"]),
        log_likelihood=-float(state["loss"]),
    )
    centre = torch.as_tensor(state["prior_mean"])
    if centre.numel() == 1:
        centre = centre.expand(sum(sizes))
    means = [
        from_flat(name.side, part, tuple(weight.shape))
        for name, weight, part in zip(names, weights, centre.split(sizes), strict=True)
    ]
    precision = _prior_precision(torch.as_tensor(state["prior_precision"]).reshape(-1).tolist(), la)
    la.restore(fit, means if bool(centre.any()) else None)
    la.prior_precision = precision
    if la.likelihood.has_noise:
        la.sigma_noise = float(state["sigma_noise"])
    return la


def _spectrum(matrix: Tensor, dtype: torch.dtype) -> Spectrum:
    values, vectors = torch.linalg.eigh(matrix)
    return Spectrum(
        values.flip(0).clamp_min(0),
        vectors.flip(1).to(dtype).contiguous(),
        torch.zeros_like(values[0]),
        matrix.trace(),
    )


def _prior_precision(values: list[float], la: LaplaceLoRA) -> float | dict[str, float]:
    """One number, or one for each parameter in pairs (A, B), as this package has it."""
    if len(set(values)) == 1:
        return values[0]
    if len(values) == len(SIDES) * len(la.layers):
        pairs = by_layer(values, la.layers)
        if all(a == b for a, b in pairs):
            return {layer.name: a for layer, (a, _) in zip(la.layers, pairs, strict=True)}
        if len(set(pairs)) == 1:
            return dict(zip(SIDES, pairs[0], strict=True))
    raise StateError(
        "a prior precision for each weight has no counterpart here: make it one a layer, or A and B"
    )
