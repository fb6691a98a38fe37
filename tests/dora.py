"""DoRA with its norm in the graph: PEFT detaches it, so that plain autograd is no oracle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_module_weight


@contextmanager
def through_the_norm() -> Iterator[None]:
    """PEFT's DoRA with the norm in the graph."""

    def forward(self, x, *, lora_A, lora_B, scaling, base_layer, base_result, adapter_name):
        weight = dequantize_module_weight(base_layer)
        directions = (weight.mT if self.fan_in_fan_out else weight) + scaling * lora_B.weight @ lora_A.weight
        gain = self.weight / directions.norm(dim=1)
        plain = base_result if base_layer.bias is None else base_result - base_layer.bias
        return (gain - 1) * plain + gain * scaling * lora_B(lora_A(x))

    before, DoraLinearLayer.forward = DoraLinearLayer.forward, forward
    try:
        yield
    finally:
        DoraLinearLayer.forward = before
