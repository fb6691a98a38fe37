"""A fitted posterior on disk: one safetensors file, its header holding everything that is not a tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from laplace_lora_fast.errors import StateError
from laplace_lora_fast.factors import Spectrum
from laplace_lora_fast.fit import Fit
from laplace_lora_fast.posterior import KronBlock
from laplace_lora_fast.taps import Site

FILE_NAME = "posterior.safetensors"
FORMAT = "laplace-lora-fast/1"
_BLOCK_TENSORS = ("small_values", "small_vectors", "mean")
_SPECTRUM_TENSORS = ("values", "vectors", "tail", "trace")


def save(
    folder: str | PathLike[str], fit: Fit, prior_mean: Sequence[Tensor] | None, settings: dict[str, Any]
) -> None:
    """Writes `folder`/posterior.safetensors, whole or not at all.

    Args:
        folder: created if missing.
        fit: the fit.
        prior_mean: of each block, or None for zero.
        settings: JSON-serialisable.
    """
    spectra: dict[int, Spectrum] = {id(block.large): block.large for block in fit.blocks}
    order = {key: index for index, key in enumerate(spectra)}
    tensors = {
        f"spectrum.{order[key]}.{field}": getattr(spectrum, field)
        for key, spectrum in spectra.items()
        for field in _SPECTRUM_TENSORS
    }
    for index, block in enumerate(fit.blocks):
        tensors |= {f"block.{index}.{field}": getattr(block, field) for field in _BLOCK_TENSORS}
        if prior_mean is not None:
            tensors[f"block.{index}.prior_mean"] = prior_mean[index]
    header = {
        "settings": settings,
        "blocks": [{"layer": b.layer, "side": b.side, "spectrum": order[id(b.large)]} for b in fit.blocks],
        "groups": fit.groups,
        "n_examples": fit.n_examples,
        "n_outputs": fit.n_outputs,
        "log_likelihood": fit.log_likelihood,
    }
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, partial, metadata={"format": FORMAT, "header": json.dumps(header)})
    os.replace(partial, path)


def load(folder: str | PathLike[str]) -> tuple[Fit, list[Tensor] | None, dict[str, Any]]:
    """Reads what `save` wrote, on the CPU.

    Returns:
        The fit, the prior mean of each block (None for zero), the settings.

    Raises:
        StateError: there is no such file, or it is truncated, or of another format.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise StateError(f"{path} does not exist: pass a folder that LaplaceLoRA.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise StateError(
                    f"{path} has format {metadata.get('format')!r}, this version reads {FORMAT!r}"
                )
            header = json.loads(metadata.get("header", ""))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise StateError(f"{path} is truncated or damaged: {error}") from error
    except json.JSONDecodeError as error:
        raise StateError(f"{path} has a damaged header: {error}") from error
    if not isinstance(header, dict):
        raise StateError(f"{path} has a damaged header")
    try:
        return _rebuild(header, tensors)
    except KeyError as error:
        raise StateError(f"{path} lacks {error}") from error


def _rebuild(
    header: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[Fit, list[Tensor] | None, dict[str, Any]]:
    spectra: dict[int, Spectrum] = {}
    blocks = []
    for index, entry in enumerate(header["blocks"]):
        key = entry["spectrum"]
        if key not in spectra:
            spectra[key] = Spectrum(*(tensors[f"spectrum.{key}.{field}"] for field in _SPECTRUM_TENSORS))
        small = (tensors[f"block.{index}.{field}"] for field in _BLOCK_TENSORS)
        blocks.append(KronBlock(entry["layer"], entry["side"], spectra[key], *small))
    fit = Fit(blocks, header["groups"], header["n_examples"], header["n_outputs"], header["log_likelihood"])
    centred = "block.0.prior_mean" in tensors
    prior_mean = [tensors[f"block.{index}.prior_mean"] for index in range(len(blocks))] if centred else None
    return fit, prior_mean, header["settings"]


def match(fit: Fit, sites: Sequence[Site]) -> Fit:
    """Checks that a loaded fit belongs to these LoRA layers and moves it to their devices.

    Raises:
        StateError: layers, shapes or MAP weights differ; names the layer.
    """
    names = [site.name for site in sites]
    saved = [block.layer for block in fit.blocks[0::2]]
    if names != saved:
        odd = sorted(set(names) ^ set(saved))[:3]
        raise StateError(
            f"the posterior was fitted on other LoRA layers than the model has; differing: {odd}"
        )
    moved: dict[int, Spectrum] = {}
    blocks = []
    for index, block in enumerate(fit.blocks):
        site = sites[index // 2]
        weight = map_weight(site, block.side)
        if weight.shape != block.mean.shape:
            raise StateError(
                f"layer {site.name!r} has lora_{block.side} of shape {tuple(weight.shape)}, "
                f"the posterior {tuple(block.mean.shape)}"
            )
        if not _sound(block):
            raise StateError(
                f"the posterior of layer {site.name!r} holds tensors of other shapes or values that are not finite"
            )
        if not same_weights(weight, block.mean):
            raise StateError(
                f"the adapter's weights of layer {site.name!r} differ from those the posterior was fitted on: "
                "load the same adapter"
            )
        device = weight.device
        if id(block.large) not in moved:
            moved[id(block.large)] = Spectrum(
                *(getattr(block.large, f).to(device) for f in _SPECTRUM_TENSORS)
            )
        small = (getattr(block, field).to(device) for field in _BLOCK_TENSORS)
        blocks.append(KronBlock(block.layer, block.side, moved[id(block.large)], *small))
    return Fit(blocks, fit.groups, fit.n_examples, fit.n_outputs, fit.log_likelihood)


def _sound(block: KronBlock) -> bool:
    """Shapes that belong together, values that are finite."""
    (r, d), large = block.mean.shape, block.large
    k = large.values.numel()
    shapes = [(large.values, (k,)), (large.vectors, (d, k)), (large.tail, ()), (large.trace, ())]
    shapes += [(block.small_values, (r,)), (block.small_vectors, (r, r))]
    return all(tensor.shape == shape and bool(tensor.isfinite().all()) for tensor, shape in shapes)


def map_weight(site: Site, side: str) -> Tensor:
    """The adapter's current weight in a block's orientation [r, d]."""
    return site.A if side == "A" else site.B.mT


def same_weights(current: Tensor, saved: Tensor) -> bool:
    """Equal, or equal up to rounding where the two are held in different dtypes."""
    if current.dtype == saved.dtype:
        return torch.equal(current, saved.to(current.device))
    eps = max(torch.finfo(t.dtype).eps for t in (current, saved))
    return torch.allclose(current.double(), saved.to(current.device).double(), rtol=eps, atol=eps * 1e-3)
