"""Model, adapter and posterior that the command line was told of, and what makes batches for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from laplace_lora_fast.cli import checks

# Heavy imports stand inside: `--help` and typing errors answer at once.


def load(
    source: str, adapter: Path, device: str, dtype: str, batch_size: int, truncate: bool
) -> tuple[Any, Any]:
    """Base model with adapter, and what makes batches for it."""
    from pickle import UnpicklingError

    import torch
    from peft import PeftModel
    from safetensors import SafetensorError

    from laplace_lora_fast.cli.rows import RowReader
    from laplace_lora_fast.data.prompts import load_causal_lm
    from laplace_lora_fast.model.heads import context_length

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    _check_adapter(adapter)
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {where} cannot be used: {checks.one_line(error)}") from error
    try:
        base, tokenizer = load_causal_lm(source, where, "auto" if dtype == "auto" else getattr(torch, dtype))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        message = checks.one_line(error)
        if not Path(source).exists() and not isinstance(error, FileNotFoundError):
            message = f"no folder of that name exists here, and from the hub: {message}"
        raise ValueError(f"model {source!r} cannot be loaded on {where}: {message}") from error
    try:
        model = PeftModel.from_pretrained(base, str(adapter)).eval()
    except UnpicklingError as error:  # whose message tells how to run the code in it
        raise ValueError(
            f"adapter {adapter} does not fit: its pickle holds more than tensors; save it as safetensors"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"adapter {adapter} does not fit model {source!r}: {checks.one_line(error)}"
        ) from error
    return model, RowReader(tokenizer, context_length(model), batch_size, truncate)


def _check_adapter(adapter: Path) -> None:
    """Raises ValueError for what is no adapter's folder, or would have PEFT import a module that it names."""
    from peft import PeftConfig

    if not adapter.exists():
        raise ValueError(f"--adapter {adapter} does not exist")
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} holds no adapter_config.json: pass a PEFT adapter folder")
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{adapter}/adapter_config.json cannot be read: {checks.one_line(error)}") from error
    if getattr(config, "megatron_config", None) is not None:
        raise ValueError(f"adapter {adapter} is one for Megatron layers, which are not supported")


def load_posterior(source: str, adapter: Path, posterior: Path, *how: Any) -> tuple[Any, Any]:
    """The fitted posterior, and what makes batches for it."""
    from laplace_lora_fast import LaplaceLoRA

    model, reader = load(source, adapter, *how)
    return LaplaceLoRA.load(posterior, model, tokenizer=reader.tokenizer), reader
