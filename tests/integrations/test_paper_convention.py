"""KFAC(tokens="paper") against an explicit computation over all positions, pads included."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laplace_lora_fast import KFAC, Answers, LaplaceLoRA, Outputs
from tests import oracle, tiny
from tests.integrations import batched
from tests.oracle import assert_close


def keep(taken: dict, key: tuple[str, str], module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
    taken[key] = args[0], out


def paper_factors(
    model: nn.Module, batches: list[tiny.Batch]
) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """(input factor, gradient factor) of lora_A and lora_B of every layer."""
    layers = {
        (name, side): getattr(layer, f"lora_{side}")["default"]
        for name, layer in oracle.lora_modules(model).items()
        for side in "AB"
    }
    sums = {key: [0, 0] for key in layers}
    n = sum(len(batch["input_ids"]) for batch in batches)
    for batch in batches:
        taken: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        handles = [layer.register_forward_hook(partial(keep, taken, key)) for key, layer in layers.items()]
        mask = batch["attention_mask"]
        last = mask.cumsum(1).argmax(1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        out = model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions).logits
        logits = out[torch.arange(len(mask)), last][:, list(tiny.ANSWERS)]
        for handle in handles:
            handle.remove()
        roots = torch.stack([oracle.exact_cotangents(row, {}) for row in logits.detach()])
        for key, (x, _) in taken.items():
            sums[key][0] = sums[key][0] + torch.einsum("nti,ntj->ij", x, x) / n
        for c in range(roots.shape[2]):
            outputs = [out for _, out in taken.values()]
            grads = torch.autograd.grad((logits * roots[:, :, c]).sum(), outputs, retain_graph=True)
            for key, g in zip(taken, grads, strict=True):
                sums[key][1] = sums[key][1] + torch.einsum("nti,ntj->ij", g, g)
    return {key: (x.detach(), g) for key, (x, g) in sums.items()}


@pytest.mark.parametrize("padding", ["left", "right"])
def test_all_positions_count_and_nothing_is_divided_by_the_length(padding: str) -> None:
    model = tiny.tiny_llama(targets=("q_proj", "v_proj", "down_proj"), layers=1).eval()
    batches = tiny.split(tiny.batch(7, length=6, seed=4, padding=padding), 4)
    la = LaplaceLoRA(model, Answers(tiny.ANSWERS), structure=KFAC("paper")).fit(batches, progress=False)
    for (name, side), (x, g) in paper_factors(model, batches).items():
        found = getattr(la.factors[name], side)
        assert_close(found.input_factor, x, 1e-10)
        assert_close(found.gradient_factor, g, 1e-10)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_it_is_what_the_papers_curvature_library_computes(padding: str) -> None:
    """asdl, by way of laplace-torch, through which the paper's code calls it. The output head has LoRA as there."""
    pytest.importorskip("laplace", reason="needs laplace-torch")
    pytest.importorskip("asdl", reason="needs asdfghjkl")
    from laplace.curvature import AsdlGGN

    data = tiny.batch(6, length=6, seed=4, padding=padding)
    wrapped = batched.decoder(targets=("q_proj", "down_proj", "lm_head")).eval()
    _, kron = AsdlGGN(wrapped, "classification").kron(data, data["labels"], 6)
    last = data["attention_mask"].cumsum(1).argmax(1)

    def every_position(output: Any, batch: tiny.Batch) -> Tensor:
        return output.logits[torch.arange(len(last)), last][:, list(tiny.ANSWERS)]

    positions = (data["attention_mask"].cumsum(1) - 1).clamp_min(0)
    la = LaplaceLoRA(wrapped.model, Outputs(every_position), structure=KFAC("paper"))
    la.fit([data | {"position_ids": positions}], progress=False)
    weights = [getattr(layer, side) for layer in la.factors.values() for side in "AB"]
    assert len(weights) == len(kron.kfacs)
    for weight, (gradient, inputs) in zip(weights, kron.kfacs, strict=True):
        assert_close(weight.input_factor, inputs, 1e-9)
        assert_close(weight.gradient_factor, gradient, 1e-9)


def test_without_padding_it_is_expand_times_the_length(tmp_path) -> None:
    model, data = tiny.tiny_llama(), tiny.batch(5, length=6, padding=None)
    paper, expand = (
        LaplaceLoRA(model, Answers(tiny.ANSWERS), structure=KFAC(tokens)).fit([data], progress=False)
        for tokens in ("paper", "expand")
    )
    for name, layer in expand.factors.items():
        assert_close(paper.factors[name].A.input_factor, 6 * layer.A.input_factor, 1e-12)
        assert_close(paper.factors[name].B.input_factor, 6 * layer.B.input_factor, 1e-12)
        assert_close(paper.factors[name].B.gradient_factor, layer.B.gradient_factor, 1e-12)
    paper.save(tmp_path)
    assert LaplaceLoRA.load(tmp_path, model).structure == KFAC("paper")
