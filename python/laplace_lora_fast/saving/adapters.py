"""Posterior samples as PEFT keeps adapters: in ordinary folders."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from laplace_lora_fast.errors import UnsupportedAdapterError
from laplace_lora_fast.model.lora import Treated
from laplace_lora_fast.model.storage import differentiable_kernels
from laplace_lora_fast.saving.atomic import new_folder
from laplace_lora_fast.weights import by_layer


def save_samples(
    model: nn.Module, layers: Sequence[Treated], samples: Sequence[Tensor], folder: str | PathLike[str]
) -> list[Path]:
    """Writes n adapters that `peft.PeftModel.from_pretrained` loads like any other.

    Args:
        model: the PEFT model; unchanged.
        layers: those under the posterior.
        samples: of every weight, [n, r, d] each. Rows of an adapted or trained language-model head that
            no answer token uses keep their MAP value: the data say nothing about them.
        folder: where the adapters' folders `sample-000`, ... go; new or empty. All of them are there in the end, or
            none.

    Returns:
        The adapters' folders.

    Raises:
        FileExistsError: `folder` is not empty.
        OSError: it cannot be written.
        UnsupportedAdapterError: PEFT would not write these weights as one adapter.
    """
    adapter = _one_adapter(model, layers)
    with new_folder(folder) as partial:
        paths = _write(model, layers, samples, partial, adapter)
    return [Path(folder) / path.relative_to(partial) for path in paths]


def _write(
    model: nn.Module, layers: Sequence[Treated], samples: Sequence[Tensor], folder: Path, adapter: str
) -> list[Path]:
    with differentiable_kernels(model):  # bitsandbytes' own way out of its packed form damages the weights
        state = {name: value.detach() for name, value in model.state_dict().items()}
    paths = []
    for index in range(samples[0].shape[0]):
        drawn = dict(state)
        for layer, values in zip(layers, by_layer(samples, layers), strict=True):
            drawn_values = layer.of_parameters([value[index] for value in values])
            for name, (value, rows) in drawn_values.items():
                drawn[name] = _with_rows(state[name], rows, value).contiguous()
        path = folder / f"sample-{index:03d}"
        try:
            model.save_pretrained(str(path), state_dict=drawn, selected_adapters=[adapter])  # type: ignore[operator]
        except SafetensorError as error:  # a full disk
            raise OSError(f"the samples cannot be written: {error}") from error
        paths.append(path if adapter == "default" else path / adapter)
        _require_written(layers, paths[-1])
    return paths


def _one_adapter(model: nn.Module, layers: Sequence[Treated]) -> str:
    """The adapter of all layers. Raises UnsupportedAdapterError if there are several, or PEFT's model does not save."""
    if not hasattr(type(model), "active_peft_config"):
        raise UnsupportedAdapterError(
            f"sample_adapters needs a peft.PeftModel, which can save an adapter; this is a {type(model).__name__}"
        )
    adapters = list(dict.fromkeys(layer.adapter for layer in layers))
    if len(adapters) > 1:
        raise UnsupportedAdapterError(
            f"the LoRA layers have the adapters {adapters} active, and a sample is one adapter: activate one with "
            "model.set_adapter(...) and fit again"
        )
    return adapters[0]


def _require_written(layers: Sequence[Treated], folder: Path) -> None:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        written = set(file.keys())
    for layer in layers:
        for name in layer.parameter_names.values():
            key = name.replace(f".modules_to_save.{layer.adapter}", "").replace(f".{layer.adapter}.", ".")
            if key not in written:
                raise UnsupportedAdapterError(f"PEFT did not write {key!r} to {folder}")


def _with_rows(weight: Tensor, rows: Tensor | None, values: Tensor) -> Tensor:
    if rows is None:
        return values.to(weight)
    weight = weight.clone()
    weight[rows.to(weight.device)] = values.to(weight)
    return weight
