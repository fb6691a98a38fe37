"""Adapters as PEFT keeps them: posterior samples in ordinary folders, where an adapter is read from, how it started."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from laplace_lora_fast.errors import UnsupportedAdapterError
from laplace_lora_fast.taps import Site

# PEFT's initialisations that take the adapter's start out of the base weights, or quantise them
_RESIDUAL_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def save_samples(
    model: nn.Module, sites: Sequence[Site], samples: Sequence[Tensor], folder: str | PathLike[str]
) -> list[Path]:
    """Writes n adapters that `peft.PeftModel.from_pretrained` loads like any other.

    Args:
        model: the PEFT model; unchanged.
        sites: its LoRA layers.
        samples: A and B of each site, [n, r, d] each, lora_B transposed. Rows of an adapted language-model head that
            no answer token uses keep their MAP value: the data say nothing about them.
        folder: where the adapters' folders `sample-000`, ... go.

    Returns:
        The adapters' folders.

    Raises:
        UnsupportedAdapterError: PEFT would not write these weights as one adapter.
        ValueError: `folder` holds samples of an earlier call that would stay.
    """
    _refuse_old_samples(folder, samples[0].shape[0])
    adapter = _one_adapter(model, sites)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    paths = []
    for index in range(samples[0].shape[0]):
        drawn = dict(state)
        for site, a, b in zip(sites, samples[0::2], samples[1::2], strict=True):
            name_a, name_b = site.weight_name("A"), site.weight_name("B")
            drawn[name_a] = a[index].to(state[name_a])
            drawn[name_b] = _with_rows(state[name_b], site.rows, b[index].mT).contiguous()
        path = Path(folder) / _name(index)
        model.save_pretrained(str(path), state_dict=drawn, selected_adapters=[adapter])  # type: ignore[operator]
        paths.append(path if adapter == "default" else path / adapter)
        _require_written(sites, paths[-1])
    return paths


def _one_adapter(model: nn.Module, sites: Sequence[Site]) -> str:
    """The adapter of all sites. Raises UnsupportedAdapterError if there are several, or PEFT's model does not save."""
    if not hasattr(type(model), "active_peft_config"):
        raise UnsupportedAdapterError(
            f"sample_adapters needs a peft.PeftModel, which can save an adapter; this is a {type(model).__name__}"
        )
    adapters = list(dict.fromkeys(site.adapter for site in sites))
    if len(adapters) > 1:
        raise UnsupportedAdapterError(
            f"the LoRA layers have the adapters {adapters} active, and a sample is one adapter: activate one with "
            "model.set_adapter(...) and fit again"
        )
    return adapters[0]


def _refuse_old_samples(folder: str | PathLike[str], n: int) -> None:
    """Raises ValueError if samples of an earlier call would stay beside n new ones: they would pass for the same."""
    new = {_name(index) for index in range(n)}
    old = sorted(path.name for path in Path(folder).glob("sample-*") if path.name not in new)
    if old:
        raise ValueError(f"folder {str(folder)!r} holds {old[0]} of an earlier call: pass an empty one")


def _name(index: int) -> str:
    return f"sample-{index:03d}"


def _require_written(sites: Sequence[Site], folder: Path) -> None:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        written = set(file.keys())
    for site in sites:
        for side in "AB":
            name = site.weight_name(side).replace(f".{site.adapter}.weight", ".weight")
            if name not in written:
                raise UnsupportedAdapterError(f"PEFT did not write {name!r} to {folder}")


def _with_rows(weight: Tensor, rows: Tensor | None, values: Tensor) -> Tensor:
    if rows is None:
        return values.to(weight)
    weight = weight.clone()
    weight[rows.to(weight.device)] = values.to(weight)
    return weight


def source(adapter: str | PathLike[str] | Mapping[str, Tensor]) -> Path | Mapping[str, Tensor]:
    """An adapter's folder or state dict. A path that is no such folder must not become a look-up on a model hub."""
    if isinstance(adapter, Mapping):
        return {re.sub(r"^((_orig_mod|module)\.)+", "", name): weight for name, weight in adapter.items()}
    folder = Path(adapter)
    if not any((folder / f"adapter_model.{suffix}").is_file() for suffix in ("safetensors", "bin")):
        raise ValueError(f"prior_mean: the folder {str(folder)!r} has no adapter_model.safetensors")
    return folder


def refuse_residual_base(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raises ValueError if the model without its adapter is not the pre-trained one, from which a refit starts."""
    configs = getattr(model, "peft_config", {})
    for adapter in dict.fromkeys(site.adapter for site in sites):
        init = str(getattr(configs.get(adapter), "init_lora_weights", True)).lower()
        if init.startswith(_RESIDUAL_BASE):
            raise ValueError(
                f"mean='refit' starts from the model without its adapter, which init_lora_weights={init!r} made a "
                "residual of the pre-trained one: use mean='map', or save the adapter converted to plain LoRA "
                "(path_initial_model_for_weight_conversion)"
            )
