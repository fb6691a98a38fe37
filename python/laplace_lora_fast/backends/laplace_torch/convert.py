"""Fitted posteriors to and from laplace-torch's `Kron` and `KronLaplace.state_dict()`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from laplace.utils import Kron
from torch import Tensor

from laplace_lora_fast.blocks import BlockCurvature, KronBlock
from laplace_lora_fast.errors import NotFittedError, StateError
from laplace_lora_fast.factors import Spectrum
from laplace_lora_fast.fit import Fit
from laplace_lora_fast.laplace import LaplaceLoRA


def to_kron(la: LaplaceLoRA) -> Kron:
    """The curvature of a fitted posterior at unit noise, as dense factors [gradient, input] of every LoRA weight.

    Args:
        la: fitted, structure="kfac".

    Returns:
        Factors in the order of the model's LoRA parameters. Low-rank factors become dense, with their tail.

    Raises:
        ValueError: the structure is another one, or an adapted language-model head is fitted on its answer rows only,
            so it has no factor of all rows.
        NotFittedError: before `fit`.
    """
    structure = la.snapshot()[0].curvature.structure
    if structure != "kfac":
        raise ValueError(f"structure {structure!r} is no Kronecker product: fit with structure='kfac'")
    for site in la.sites:
        if site.rows is not None:
            raise ValueError(
                f"layer {site.name!r} is fitted on its answer rows only: it has no Kron of all rows"
            )
    return Kron(
        [
            [weight.gradient_factor, weight.input_factor]
            for layer in la.factors.values()
            for weight in (layer.A, layer.B)
        ]
    )


def to_state_dict(la: LaplaceLoRA) -> dict[str, Any]:
    """What `KronLaplace.load_state_dict` reads, for a `KronLaplace` over the same model's LoRA weights.

    Args:
        la: fitted on batches with labels.

    Raises:
        ValueError: as `to_kron`.
        NotFittedError: before `fit`, or fitted on batches without labels.
    """
    kron, (fit, centre) = to_kron(la), la.snapshot()
    if fit.log_likelihood is None:
        raise NotFittedError(
            "laplace-torch's state holds the training loss: fit with 'labels' in every batch"
        )
    posterior = la.posterior
    like, sides = fit.curvature.means[0], [side for _, side in fit.curvature.names]
    prior = posterior.prior_precision.to(like)
    mean = [_flat(side, value) for side, value in zip(sides, fit.curvature.means, strict=True)]
    return {
        "mean": torch.cat(mean),
        "H": kron.kfacs,
        "loss": like.new_tensor(-fit.log_likelihood),
        "prior_mean": like.new_zeros(())
        if centre is None
        else torch.cat(
            [
                _flat(side, value.expand(mean.shape)).to(like)
                for side, value, mean in zip(sides, centre, fit.curvature.means, strict=True)
            ]
        ),
        "prior_precision": prior[:1] if bool((prior == prior[0]).all()) else prior,
        "sigma_noise": like.new_tensor(la.sigma_noise),
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
        la: over the same model and adapter, structure="kfac" or "auto"; its prior mean, prior precision and noise are
            overwritten.
        state: laplace-torch's.

    Returns:
        `la`.

    Raises:
        StateError: the state is of another class, likelihood or adapter, its temperature is not 1, or its prior
            precision is neither one number, one a layer, nor one for all lora_A and one for all lora_B.
        ValueError: `la` has another structure.
    """
    if la.options.structure not in ("kfac", "auto") or la.options.mean != "map":
        raise ValueError(f"laplace-torch's factors are structure='kfac', not {la.options.structure!r}")
    if (
        state["cls_name"] != "KronLaplace"
        or state["likelihood"] != la.likelihood.name
        or state["temperature"] != 1
    ):
        raise StateError(
            f"expected a KronLaplace of likelihood {la.likelihood.name!r} at temperature 1, got "
            f"{state['cls_name']}, {state['likelihood']!r}, {state['temperature']}"
        )
    weights = [(site, side, site.A if side == "A" else site.B.mT) for site in la.sites for side in "AB"]
    sizes = [weight.numel() for *_, weight in weights]
    if len(state["H"]) != len(weights) or len(state["mean"]) != sum(sizes):
        raise StateError(
            f"the state has {len(state['H'])} factor pairs, the model {len(weights)} LoRA weights"
        )
    blocks = []
    for (site, side, weight), factors, mean in zip(
        weights, state["H"], state["mean"].split(sizes), strict=True
    ):
        gradient, inputs = (factor.double() for factor in factors)
        large, small = (inputs, gradient) if side == "A" else (gradient, inputs)
        if (len(small), len(large)) != tuple(weight.shape):
            raise StateError(f"layer {site.name!r} has other shapes than the state's factors")
        blocks.append(KronBlock.kfac(_spectrum(large, weight.dtype), small, _oriented(mean, side, weight)))
    fit = Fit(
        curvature=BlockCurvature("kfac", [(site.name, side) for site, side, _ in weights], blocks),
        groups=list(range(len(la.sites))),
        n_examples=int(state["n_data"]),
        n_outputs=int(state["n_outputs"]),
        log_likelihood=-float(state["loss"]),
    )
    centre = torch.as_tensor(state["prior_mean"])
    if centre.numel() == 1:
        centre = centre.expand(sum(sizes))
    means = [
        _oriented(part, side, weight)
        for (_, side, weight), part in zip(weights, centre.split(sizes), strict=True)
    ]
    precision = _prior_precision(torch.as_tensor(state["prior_precision"]).reshape(-1).tolist(), la)
    la.restore(fit, means if bool(centre.any()) else None)
    la.prior_precision = precision
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


def _oriented(flat: Tensor, side: str, weight: Tensor) -> Tensor:
    """A flattened parameter as `weight` [r, d] is oriented: lora_B transposed."""
    r, d = weight.shape
    return flat.reshape(r, d) if side == "A" else flat.reshape(d, r).mT


def _flat(side: str, value: Tensor) -> Tensor:
    """The inverse of `_oriented`."""
    return (value if side == "A" else value.mT).flatten()


def _prior_precision(values: list[float], la: LaplaceLoRA) -> float | dict[str, float]:
    """One number, or one for each parameter in pairs (A, B), as this package has it."""
    a, b = values[0::2], values[1::2]
    if len(set(values)) == 1:
        return values[0]
    if len(values) == 2 * len(la.sites) and a == b:
        return {site.name: value for site, value in zip(la.sites, a, strict=True)}
    if len(values) == 2 * len(la.sites) and len(set(a)) == len(set(b)) == 1:
        return {"A": a[0], "B": b[0]}
    raise StateError(
        "a prior precision for each weight has no counterpart here: make it one a layer, or A and B"
    )
