"""A fitted posterior on disk: one safetensors file, its header holding everything that is not a tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from laplace_lora_fast import identity
from laplace_lora_fast.blocks import BlockCurvature
from laplace_lora_fast.curvature import BlockName, Curvature
from laplace_lora_fast.dual import DualCurvature
from laplace_lora_fast.errors import StateError
from laplace_lora_fast.fit import Fit
from laplace_lora_fast.identity import FrozenWeights
from laplace_lora_fast.refit import RefittedCurvature
from laplace_lora_fast.taps import Site

FILE_NAME = "posterior.safetensors"
FORMAT = "laplace-lora-fast/3"
_OF_THE_FIT = ("groups", "n_examples", "n_outputs", "log_likelihood", "reason")


def save(
    folder: str | PathLike[str],
    fit: Fit,
    prior_mean: Sequence[Tensor] | None,
    settings: dict[str, Any],
    scalings: Sequence[float],
    frozen: FrozenWeights,
) -> None:
    """Writes `folder`/posterior.safetensors, whole or not at all.

    Args:
        folder: created if missing.
        fit: the fit.
        prior_mean: of each block, or None for zero.
        settings: JSON-serialisable.
        scalings: of each LoRA layer.
        frozen: the weights around the adapter.
    """
    tensors = fit.curvature.tensors()
    if prior_mean is not None:
        tensors |= {f"prior_mean.{index}": mean for index, mean in enumerate(prior_mean)}
    header = {
        "settings": settings,
        "structure": fit.curvature.structure,
        "names": fit.curvature.names,
        "scalings": scalings,
        "frozen": frozen.fingerprints,
        **{key: getattr(fit, key) for key in _OF_THE_FIT},
    }
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, partial, metadata={"format": FORMAT, "header": json.dumps(header)})
    os.replace(partial, path)


@dataclass(frozen=True)
class Saved:
    """A posterior file: its settings, and what needs the model's layers to become a fit."""

    path: Path
    header: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.header["settings"])

    def rebuild(self, sites: Sequence[Site]) -> tuple[Fit, list[Tensor] | None]:
        """The fit on the devices of these LoRA layers, and the prior mean of each block (None for zero).

        Raises:
            StateError: layers differ or a tensor is missing; names it.
        """
        names = [(layer, side) for layer, side in self.header["names"]]
        _check_names(names, sites)
        rows: dict[str, type[Curvature]] = {
            kind.structure: kind for kind in (DualCurvature, RefittedCurvature)
        }
        kind = rows.get(self.header["structure"], BlockCurvature)
        devices = [site.A.device for site in sites for _ in "AB"]
        try:
            curvature = kind.from_tensors(self.header["structure"], names, self.tensors, devices)
            count = sum(name.startswith("prior_mean.") for name in self.tensors)
            prior_mean = [self.tensors[f"prior_mean.{index}"] for index in range(count)] or None
        except KeyError as error:
            raise StateError(f"{self.path} lacks {error}") from error
        rest = {key: self.header[key] for key in _OF_THE_FIT}
        return Fit(curvature, **rest), prior_mean

    def frozen_weights(self, model: nn.Module, sites: Sequence[Site]) -> FrozenWeights:
        """The weights around the adapter, which with its scalings have to be those of the fit.

        Raises:
            StateError: they are not; names the first that differs.
        """
        for site, scaling in zip(sites, self.header["scalings"], strict=True):
            if site.scaling != scaling:
                raise StateError(
                    f"layer {site.name!r} has scaling {site.scaling:g}, the posterior was fitted with {scaling:g}: "
                    "check lora_alpha"
                )
        saved = FrozenWeights(self.header["frozen"])
        now = saved.now(model)
        saved.require_same(
            now,
            StateError,
            "is not the one the posterior was fitted with: load the same base model and trained modules",
        )
        return now


def load(folder: str | PathLike[str]) -> Saved:
    """Reads what `save` wrote, on the CPU.

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
            # cloned to torch's alignment, on which the last bit of products can depend
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise StateError(f"{path} is truncated or damaged: {error}") from error
    except json.JSONDecodeError as error:
        raise StateError(f"{path} has a damaged header: {error}") from error
    missing = {"settings", "structure", "names", "scalings", "frozen", *_OF_THE_FIT} - set(header)
    if missing:
        raise StateError(f"{path} has a damaged header: no {sorted(missing)}")
    return Saved(path, header, tensors)


def check(curvature: Curvature, sites: Sequence[Site]) -> None:
    """Refuses a curvature that is damaged or does not belong to the adapter.

    Raises:
        StateError: names the layer.
    """
    _check_names(curvature.names, sites)
    for index in curvature.damaged():
        layer = curvature.names[index][0]
        raise StateError(
            f"the posterior of layer {layer!r} has tensors of wrong shapes or values that are not finite"
        )
    identity.require_shapes(curvature, sites, StateError)
    identity.require_weights(
        curvature,
        identity.unchanged_weights(curvature, sites),
        StateError,
        "differ from those the posterior was fitted on: load the same adapter",
    )


def _check_names(names: Sequence[BlockName], sites: Sequence[Site]) -> None:
    expected = [(site.name, side) for site in sites for side in "AB"]
    if list(names) != expected:
        odd = sorted({layer for layer, _ in set(names) ^ set(expected)})[:3]
        raise StateError(
            f"the posterior was fitted on other LoRA layers than the model has; differing: {odd}"
        )
