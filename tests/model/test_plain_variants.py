"""Variants of LoRA that train differently and are plain LoRA in evaluation: their posterior is plain LoRA's."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from laplace_lora_fast import Answers, LaplaceLoRA, Rows
from tests import tiny

VARIANTS: dict[str, Any] = {
    "MonteCLoRA": lambda: {"monteclora_config": peft.MontecloraConfig()},
    "VeLoRA": lambda: {"velora_config": peft.VeloraConfig(num_groups=4)},
}


@pytest.mark.skipif(not hasattr(peft, "MontecloraConfig"), reason="this PEFT has none of them")
@pytest.mark.parametrize("name", VARIANTS)
def test_as_plain_lora(name: str) -> None:
    plain, varied = tiny.tiny_llama(), tiny.tiny_llama(**VARIANTS[name]())
    assert any(getattr(module, "lora_variant", None) for module in varied.modules())
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for key, weight in varied.named_parameters():
            if "lora_A.default.weight" in key or "lora_B.default.weight" in key:
                weight.copy_(weights[key])
    train, test = tiny.split(tiny.batch(6, seed=1), 3), tiny.batch(3, seed=2)
    found = []
    for model in (plain, varied.eval()):
        la = LaplaceLoRA(model, Answers(tiny.ANSWERS), structure=Rows(columns=64), prior_precision=0.5)
        found.append(la.fit(train, progress=False).logit_distribution(test))
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
