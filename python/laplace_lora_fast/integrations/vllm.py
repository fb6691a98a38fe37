"""vLLM: adapters that `LaplaceLoRA.sample_adapters` wrote, found by name when a request asks for one.

    from laplace_lora_fast.integrations.vllm import register
    register("samples/")                       # in a plugin of vLLM's, before the server starts

A request with `model="sample-003"` is then answered by that sample. vLLM has to be started with --enable-lora and
VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and keeps its prefix cache for each sample by itself. Written for the interface of
vLLM 0.8 to 0.33; checked against a stand-in of it, not against vLLM.
"""

from __future__ import annotations

import zlib
from os import PathLike
from pathlib import Path

from laplace_lora_fast.integrations.hosts import require

require("vllm", [f"0.{minor}" for minor in range(8, 34)])

from vllm.lora.request import LoRARequest  # noqa: E402  which may not be there
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry  # noqa: E402


class SampleResolver(LoRAResolver):
    """Finds samples by the names of their folders.

    Args:
        folder: that `sample_adapters` wrote.
        base_model: the name that the served model must have; None for any.

    Raises:
        FileNotFoundError: there is no sample.
    """

    def __init__(self, folder: str | PathLike[str], base_model: str | None = None) -> None:
        self._base_model = base_model
        self._samples = {path.parent.name: path.parent for path in Path(folder).glob("*/adapter_config.json")}
        if not self._samples:
            raise FileNotFoundError(f"{folder} holds no sample: write some with LaplaceLoRA.sample_adapters")

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The sample of this name; None where it is none, so that others may know it."""
        if lora_name not in self._samples or self._base_model not in (None, base_model_name):
            return None
        path = str(self._samples[lora_name].resolve())
        number = zlib.crc32(path.encode()) % (2**31 - 1) + 1  # positive, the same in every process
        return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=path)


def register(
    folder: str | PathLike[str], base_model: str | None = None, name: str = "laplace"
) -> SampleResolver:
    """Makes the samples in a folder known to this process's vLLM."""
    resolver = SampleResolver(folder, base_model)
    LoRAResolverRegistry.register_resolver(name, resolver)
    return resolver
