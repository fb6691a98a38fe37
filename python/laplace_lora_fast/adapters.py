"""Posterior samples as ordinary PEFT adapter folders."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from torch import Tensor, nn

from laplace_lora_fast.taps import Site


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
    """
    state = {name: value.detach() for name, value in model.state_dict().items()}
    adapter = sites[0].adapter
    paths = []
    for index in range(samples[0].shape[0]):
        drawn = dict(state)
        for site, a, b in zip(sites, samples[0::2], samples[1::2], strict=True):
            name_a, name_b = site.weight_name("A"), site.weight_name("B")
            drawn[name_a] = a[index].to(state[name_a])
            drawn[name_b] = _with_rows(state[name_b], site.rows, b[index].mT).contiguous()
        path = Path(folder) / f"sample-{index:03d}"
        model.save_pretrained(str(path), state_dict=drawn, selected_adapters=[adapter])  # type: ignore[operator]
        paths.append(path if adapter == "default" else path / adapter)
    return paths


def _with_rows(weight: Tensor, rows: Tensor | None, values: Tensor) -> Tensor:
    if rows is None:
        return values.to(weight)
    weight = weight.clone()
    weight[rows.to(weight.device)] = values.to(weight)
    return weight
