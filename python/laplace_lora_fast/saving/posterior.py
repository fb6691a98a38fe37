"""A fitted posterior on disk: one safetensors file, its header holding everything that is not a tensor."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from laplace_lora_fast.errors import LaplaceWarning, StateError
from laplace_lora_fast.fitting.fit import Fit
from laplace_lora_fast.likelihoods import Likelihood
from laplace_lora_fast.model.adapters.trained import ALL
from laplace_lora_fast.model.lora import Treated
from laplace_lora_fast.model.proofs.additions import difference
from laplace_lora_fast.options import from_json, kinds, to_json
from laplace_lora_fast.prior.precision import PriorPrecision
from laplace_lora_fast.saving import checked, fingerprint
from laplace_lora_fast.saving.checked import MALFORMED
from laplace_lora_fast.saving.fingerprint import FittedOn
from laplace_lora_fast.saving.surroundings import Surroundings
from laplace_lora_fast.structures.base import Curvature, Structure
from laplace_lora_fast.tasks import Task
from laplace_lora_fast.weights import HEAD, SIDES, WeightName, weight_names

FILE_NAME = "posterior.safetensors"
FORMAT = "laplace-lora-fast/5"
_OF_THE_FIT = ("shared_inputs", "n_examples", "n_outputs", "log_likelihood", "reason")
_LATER = {"n_skipped": 0}  # of the fit, and what a file has that was written without it
_KEYS = {"settings", "structure", "names", "scalings", "surroundings", *_OF_THE_FIT}


def save(
    folder: str | PathLike[str],
    fit: Fit,
    prior_mean: Sequence[Tensor] | None,
    settings: dict[str, Any],
    scalings: Sequence[float],
    fitted_on: FittedOn,
    tokenizer: dict[str, str] | None = None,
) -> None:
    """Writes `folder`/posterior.safetensors, whole or not at all.

    Args:
        folder: created if missing.
        fit: the fit.
        prior_mean: of each weight, or None for zero.
        settings: JSON-serialisable.
        scalings: of each LoRA layer.
        fitted_on: what is around the adapter.
        tokenizer: see `tokenizers`.

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
        "surroundings": fitted_on.surroundings.to_json(),
        "additions": fitted_on.additions,
        "tokenizer": tokenizer,
        **{key: getattr(fit, key) for key in (*_OF_THE_FIT, *_LATER)},
    }
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    checked.write(path, FORMAT, header, tensors)


def settings_of(
    task: Task,
    structure: Structure | str,
    prior_precision: PriorPrecision,
    noise: float | None,
    layers: Sequence[str] | None,
    trained: str | Sequence[str],
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
        "trained": trained,
        "budget": budget,
        "seed": seed,
    }


@dataclass(frozen=True)
class Saved:
    """A posterior file: its settings, and what needs the model's layers to become a fit."""

    path: Path
    header: dict[str, Any]
    tensors: dict[str, Tensor]
    surroundings: Surroundings

    def settings(self, task: Task | None) -> dict[str, Any]:
        """What `settings_of` gave, as objects.

        Args:
            task: the task, where it holds code.

        Raises:
            StateError: a setting is unknown or not valid.
            ValueError: `task` is needed and missing, or not that of the fit.
        """
        settings: dict[str, Any] = {"trained": ALL}  # which files of before do not have
        settings |= self.header["settings"]
        data = settings.pop("task")
        if task is None:
            task = self._task(data)
        elif to_json(task, without=task.code) != data:
            raise ValueError(f"task must be the one the posterior was fitted with, {data}, got {task!r}")
        try:
            return settings | {"task": task, "structure": from_json(settings["structure"])}
        except ValueError as error:
            raise StateError(f"the posterior's settings do not fit: {error}") from error

    def _task(self, data: dict[str, Any]) -> Task:
        (name,) = data
        try:
            task: Task = from_json(data)
        except ValueError as error:
            if any(kind.__name__ == name and not kind.code for kind in kinds(Task)):
                raise StateError(f"the posterior's task does not fit: {error}") from error
            raise ValueError(
                f"this posterior was fitted with a task {name} that holds code, or is not registered: pass "
                f"task={name}(..) to load ({error})"
            ) from error
        return task

    def rebuild(self, layers: Sequence[Treated], likelihood: Likelihood) -> tuple[Fit, list[Tensor] | None]:
        """The fit on the devices of these LoRA layers, and the prior mean of each weight (None for zero).

        Raises:
            StateError: layers differ or a tensor is missing; names it.
        """
        names = [WeightName(layer, side) for layer, side in self.header["names"]]
        _check_names(names, layers)
        by_name = {layer.name: layer.weights.matrices[0].device for layer in layers}
        devices = [by_name[name.layer] for name in names]
        try:
            structure = from_json(self.header["structure"])
            curvature = structure.rebuild(names, self.tensors, devices, likelihood)
            count = sum(name.startswith("prior_mean.") for name in self.tensors)
            prior_mean = [self.tensors[f"prior_mean.{index}"] for index in range(count)] or None
        except KeyError as error:
            raise StateError(f"{self.path} lacks {error}") from error
        except MALFORMED as error:
            raise StateError(f"{self.path} has a structure that does not fit: {error}") from error
        rest = {key: self.header[key] for key in _OF_THE_FIT}
        rest |= {key: self.header.get(key, default) for key, default in _LATER.items()}
        return Fit(structure, curvature, **rest), prior_mean

    def fitted_on(self, model: nn.Module, layers: Sequence[Treated]) -> FittedOn:
        """The model with what is around the adapter, which with its scalings has to be as it was at the fit.

        Warns where others have hung something else on its modules: whether that matters cannot be told.

        Raises:
            StateError: it is not; names the first difference.
        """
        for layer, scaling in zip(layers, self.header["scalings"], strict=True):
            if layer.scaling != scaling:
                raise StateError(
                    f"layer {layer.name!r} has scaling {layer.scaling:g}, the posterior was fitted with {scaling:g}: "
                    "check lora_alpha"
                )
        now = Surroundings.of(model, layers)
        different = self.surroundings.difference(now)
        if different:
            raise StateError(
                f"{different} is not the one the posterior was fitted with: load the same base model, trained modules "
                "and configuration"
            )
        fitted_on = FittedOn(model, layers, now.common(self.surroundings))
        others = difference(self.header.get("additions", fitted_on.additions), fitted_on.additions)
        if others:
            warnings.warn(
                f"since the posterior was fitted, the model {others}. Where that changes what the model computes, the "
                "posterior is another model's: undo it, or fit again",
                LaplaceWarning,
                stacklevel=4,
            )
        return fitted_on


def load(folder: str | PathLike[str]) -> Saved:
    """Reads what `save` wrote, on the CPU.

    Raises:
        StateError: there is no such file, or it is truncated, or of another format.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise StateError(f"{path} does not exist: pass a folder that LaplaceLoRA.save wrote")
    header, tensors = checked.read(path, FORMAT, "fit again, or use the version that wrote it")
    try:
        _require_form(header)
        return Saved(path, header, tensors, Surroundings.from_json(header["surroundings"]))
    except MALFORMED as error:
        raise StateError(f"{path} has a damaged header: {error}") from error


def _require_form(header: Any) -> None:
    """Raises one of `MALFORMED` unless the header has what it should, of the right kinds."""
    missing = _KEYS - header.keys()
    if missing:
        raise ValueError(f"no {sorted(missing)}")
    settings, noise = header["settings"], header["settings"]["noise"]
    n = len({layer for layer, _ in header["names"]})
    wrong = {
        "names": not all(
            isinstance(layer, str) and side in (*SIDES, HEAD) for layer, side in header["names"]
        ),
        "scalings": len(header["scalings"]) != n or not all(_is_number(each) for each in header["scalings"]),
        "shared_inputs": len(header["shared_inputs"]) != n
        or not all(type(each) is int and 0 <= each < n for each in header["shared_inputs"]),
        "n_examples": type(header["n_examples"]) is not int or header["n_examples"] < 1,
        "n_skipped": type(header.get("n_skipped", 0)) is not int or header.get("n_skipped", 0) < 0,
        "n_outputs": type(header["n_outputs"]) is not int or header["n_outputs"] < 1,
        "log_likelihood": header["log_likelihood"] is not None and not _is_number(header["log_likelihood"]),
        "reason": not isinstance(header["reason"], str),
        "tokenizer": not isinstance(header.get("tokenizer") or {}, dict),
        "additions": not _are_words(header.get("additions", [])),
        "task": not isinstance(settings["task"], dict) or len(settings["task"]) != 1,
        "structure": "structure" not in settings,
        "noise": noise is not None and not (_is_number(noise) and noise > 0),
    }
    odd = [key for key, is_wrong in wrong.items() if is_wrong]
    if odd:
        raise ValueError(f"{odd} not as this version writes it")


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def check(curvature: Curvature, layers: Sequence[Treated]) -> None:
    """Refuses a curvature that is damaged or does not belong to the adapter.

    Raises:
        StateError: names the layer.
    """
    _check_names(curvature.names, layers)
    try:
        damaged = curvature.damaged()
    except MALFORMED as error:
        raise StateError(f"the posterior's tensors do not belong together: {error}") from error
    for index in damaged:
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


def _check_names(names: Sequence[WeightName], layers: Sequence[Treated]) -> None:
    expected = weight_names(layers)
    if list(names) != expected:
        odd = sorted({name.layer for name in set(names) ^ set(expected)})[:3]
        raise StateError(
            f"the posterior was fitted on other LoRA layers or trained heads than the model has; differing: {odd}"
        )
