"""Axolotl: a plugin that fits the posterior at the end of training, by the callback of `integrations.trainer`.

    plugins: [laplace_lora_fast.integrations.axolotl.LaplacePlugin]
    laplace_task: {Answers: {token_ids: [1234, 5678]}}      # or a short name: tokens, options, preference
    laplace_tuning: held_out                                # or evidence, or null to keep prior_precision
    laplace_options: {structure: kfac}

Written for the plugin interface of axolotl 0.8 to 0.21; checked against a stand-in of it, not against axolotl.
"""

from __future__ import annotations

from typing import Any

from laplace_lora_fast.integrations.hosts import require
from laplace_lora_fast.integrations.trainer import HELD_OUT, LaplaceCallback
from laplace_lora_fast.options import from_json
from laplace_lora_fast.tasks import Task

require("axolotl", [f"0.{minor}" for minor in range(8, 22)])

from axolotl.integrations.base import BasePlugin  # noqa: E402  which may not be there
from pydantic import BaseModel  # noqa: E402

_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")


class LaplaceArgs(BaseModel):
    """What the plugin reads of a configuration.

    Attributes:
        laplace_task: what the model answers: a short name, or an object's JSON form.
        laplace_tuning: how the prior precision is chosen; see `LaplaceCallback`.
        laplace_options: what `LaplaceLoRA` takes beside.
    """

    laplace_task: str | dict[str, Any] | None = None
    laplace_tuning: str | dict[str, Any] | None = HELD_OUT
    laplace_options: dict[str, Any] | None = None


class LaplacePlugin(BasePlugin):
    """Fits, tunes and saves the posterior beside the adapter when training ends."""

    def get_input_args(self) -> str:
        """Where the fields of the configuration are described."""
        return f"{__name__}.LaplaceArgs"

    def pre_model_load(self, cfg: Any) -> None:
        """Refuses, before a model is loaded, what could not work at the end.

        Raises:
            ValueError: `laplace_task` is missing, or a fused LoRA kernel is on: PEFT's layers would not run then.
        """
        if cfg.get("laplace_task") is None:
            raise ValueError(
                "LaplacePlugin needs laplace_task, such as tokens or {Answers: {token_ids: [..]}}"
            )
        fused = [name for name in _KERNELS if cfg.get(name)]
        if fused:
            raise ValueError(
                f"LaplacePlugin needs PEFT's own LoRA layers, which {fused[0]}: true replaces: set it false"
            )

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """The callback that fits."""
        self.pre_model_load(cfg)
        tuning = cfg.get("laplace_tuning")
        options = {name: _option(value) for name, value in (cfg.get("laplace_options") or {}).items()}
        task: Task = _option(cfg.get("laplace_task"))
        return [LaplaceCallback(task, tuning=_option(tuning), **options)]


def _option(value: Any) -> Any:
    """An object of its JSON form; names and numbers as they are."""
    return (
        from_json({key: dict(fields) for key, fields in value.items()}) if isinstance(value, dict) else value
    )
