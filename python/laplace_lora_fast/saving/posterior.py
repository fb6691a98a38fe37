"""A fitted posterior on disk: one safetensors file, its header holding everything that is not a tensor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from laplace_lora_fast.errors import StateError
from laplace_lora_fast.fitting.fit import Fit
from laplace_lora_fast.likelihoods import Likelihood
from laplace_lora_fast.model.lora import LoraLayer
from laplace_lora_fast.options import from_json, to_json
from laplace_lora_fast.prior.precision import PriorPrecision
from laplace_lora_fast.saving import fingerprint
from laplace_lora_fast.saving.atomic import replacing
from laplace_lora_fast.saving.fingerprint import FrozenWeights
from laplace_lora_fast.structures.base import Curvature, Structure
from laplace_lora_fast.tasks import Task
from laplace_lora_fast.weights import WeightName, weight_names

FILE_NAME = "posterior.safetensors"
FORMAT = "laplace-lora-fast/4"
_OF_THE_FIT = ("shared_inputs", "n_examples", "n_outputs", "log_likelihood", "reason")


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
        prior_mean: of each weight, or None for zero.
        settings: JSON-serialisable.
        scalings: of each LoRA layer.
        frozen: the weights around the adapter.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = fit.curvature.tensors()
    if prior_mean is not None:
        tensors |= {f"prior_mean.{index}": mean for index, mean in enumerate(prior_mean)}
    header = {
        "settings": settings,
        "structure": to_json(fit.structure),
        "names": fit.curvature.names,
        "scalings": scalings,
        "frozen": frozen.fingerprints,
        **{key: getattr(fit, key) for key in _OF_THE_FIT},
    }
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        try:
            save_file(contiguous, partial, metadata={"format": FORMAT, "header": json.dumps(header)})
        except SafetensorError as error:  # a full disk
            raise OSError(f"{path} cannot be written: {error}") from error


def settings_of(
    task: Task,
    structure: Structure | str,
    prior_precision: PriorPrecision,
    noise: float | None,
    layers: Sequence[str] | None,
    budget: int | None,
    seed: int,
) -> dict[str, Any]:
    """What `LaplaceLoRA` was made with, as JSON. Raises TypeError for an option without a JSON form."""
    return {
        "task": to_json(task, without=task.code),
        "structure": to_json(structure),
        "prior_precision": prior_precision,
        "noise": noise,
        "layers": layers,
        "budget": budget,
        "seed": seed,
    }


@dataclass(frozen=True)
class Saved:
    """A posterior file: its settings, and what needs the model's layers to become a fit."""

    path: Path
    header: dict[str, Any]
    tensors: dict[str, Tensor]

    def settings(self, task: Task | None) -> dict[str, Any]:
        """What `settings_of` gave, as objects.

        Args:
            task: the task, where it holds code.

        Raises:
            StateError: a setting is unknown or not valid.
            ValueError: `task` is needed and missing, or not that of the fit.
        """
        settings = dict(self.header["settings"])
        data = settings.pop("task")
        if task is None:
            name = next(iter(data))
            try:
                task = from_json(data)
            except ValueError as error:
                raise ValueError(
                    f"this posterior was fitted with a task {name} that holds code, or is not registered: pass "
                    f"task={name}(..) to load ({error})"
                ) from error
        elif to_json(task, without=task.code) != data:
            raise ValueError(f"task must be the one the posterior was fitted with, {data}, got {task!r}")
        try:
            structure = from_json(settings.pop("structure"))
        except ValueError as error:
            raise StateError(f"the posterior's settings do not fit: {error}") from error
        return {**settings, "task": task, "structure": structure}

    def rebuild(self, layers: Sequence[LoraLayer], likelihood: Likelihood) -> tuple[Fit, list[Tensor] | None]:
        """The fit on the devices of these LoRA layers, and the prior mean of each weight (None for zero).

        Raises:
            StateError: layers differ or a tensor is missing; names it.
        """
        names = [WeightName(layer, side) for layer, side in self.header["names"]]
        _check_names(names, layers)
        by_name = {layer.name: layer.weights.A.device for layer in layers}
        devices = [by_name[name.layer] for name in names]
        try:
            structure = from_json(self.header["structure"])
            curvature = structure.rebuild(names, self.tensors, devices, likelihood)
            count = sum(name.startswith("prior_mean.") for name in self.tensors)
            prior_mean = [self.tensors[f"prior_mean.{index}"] for index in range(count)] or None
        except KeyError as error:
            raise StateError(f"{self.path} lacks {error}") from error
        except ValueError as error:
            raise StateError(f"{self.path} has a structure that does not fit: {error}") from error
        rest = {key: self.header[key] for key in _OF_THE_FIT}
        return Fit(structure, curvature, **rest), prior_mean

    def frozen_weights(self, model: nn.Module, layers: Sequence[LoraLayer]) -> FrozenWeights:
        """The weights around the adapter, which with its scalings have to be those of the fit.

        Raises:
            StateError: they are not; names the first that differs.
        """
        for layer, scaling in zip(layers, self.header["scalings"], strict=True):
            if layer.scaling != scaling:
                raise StateError(
                    f"layer {layer.name!r} has scaling {layer.scaling:g}, the posterior was fitted with {scaling:g}: "
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


def check(curvature: Curvature, layers: Sequence[LoraLayer]) -> None:
    """Refuses a curvature that is damaged or does not belong to the adapter.

    Raises:
        StateError: names the layer.
    """
    _check_names(curvature.names, layers)
    for index in curvature.damaged():
        layer = curvature.names[index].layer
        raise StateError(
            f"the posterior of layer {layer!r} has tensors of wrong shapes or values that are not finite"
        )
    fingerprint.require_shapes(curvature, layers, StateError)
    fingerprint.require_weights(
        curvature,
        fingerprint.unchanged_weights(curvature, layers),
        StateError,
        "differ from those the posterior was fitted on: load the same adapter",
    )


def _check_names(names: Sequence[WeightName], layers: Sequence[LoraLayer]) -> None:
    expected = weight_names(layer.name for layer in layers)
    if list(names) != expected:
        odd = sorted({name.layer for name in set(names) ^ set(expected)})[:3]
        raise StateError(
            f"the posterior was fitted on other LoRA layers than the model has; differing: {odd}"
        )
