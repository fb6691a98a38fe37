"""Fits of tiny models, and all that a user can see of one: what must not matter is shown on these."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from laplace_lora_fast import EKFAC, KFAC, Answers, Classes, Diagonal, LaplaceLoRA, Rows
from laplace_lora_fast.structures import Structure
from laplace_lora_fast.tasks import Task
from tests import tiny

ANSWERS = Answers(tiny.ANSWERS)
MODES = [
    KFAC(tokens=tokens, factors="dense", fisher=fisher)
    for tokens in ("expand", "reduce")
    for fisher in ("exact", "empirical")
]
OTHER_STRUCTURES = [EKFAC(factors="dense"), Diagonal(), Rows(columns=5), Rows(columns=5, refit=True)]

MODELS = {
    "llama": (lambda: tiny.tiny_llama(targets=("q_proj", "v_proj", "lm_head")), ANSWERS),
    "llama classifier": (lambda: tiny.tiny_llama_classifier(3, targets=("v_proj", "score")), Classes()),
    "gpt2": (lambda: tiny.tiny_gpt2(targets=("c_attn", "c_proj")), ANSWERS),
    "bert": (lambda: tiny.tiny_bert_classifier(3, targets=("query", "dense", "classifier")), Classes()),
}


def fitted(
    model: nn.Module, task: Task, loader: Iterable[Any], structure: Structure | None = None
) -> LaplaceLoRA:
    """With KFAC in dense factors unless told otherwise."""
    structure = KFAC(factors="dense") if structure is None else structure
    return LaplaceLoRA(model, task, structure=structure, prior_precision=0.7).fit(loader, progress=False)


def results(la: LaplaceLoRA, batch: tiny.Batch) -> dict[str, Tensor]:
    """Everything a user can see of a fit, by name; nothing in it depends on an eigenvector's sign."""
    out = {"evidence": la.log_marginal_likelihood()}
    for name, layer in la.factors.items() if type(la.structure) is KFAC else ():
        for side, weight in (("A", layer.A), ("B", layer.B)):
            out[f"{name} {side} input"] = weight.input_factor
            out[f"{name} {side} gradient"] = weight.gradient_factor
    out["mean"], out["covariance"] = la.logit_distribution(batch)
    out["probabilities"] = la.predict(batch)
    return out


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        scale = float(value.abs().max())
        assert scale > 0, key
        torch.testing.assert_close(
            got[key], value, rtol=0, atol=rtol * scale, msg=lambda m, key=key: f"{key}: {m}"
        )


def prepared(name: str, batch: tiny.Batch) -> tiny.Batch:
    """Classifiers are not told where their padding is: absolute positions, and rotary ones rounded to fp32, shift."""
    if name != "llama classifier":
        return batch
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


class Pooled(nn.Module):
    """Mean of token features, with `filler` in every padded row of the hidden states, forward and backward."""

    def __init__(
        self, classes: int, filler: float, segment: dict[str, Any] | None = None, width: int = 8
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        ends = 3 * width // 4
        self.embed, self.first = nn.Embedding(tiny.VOCAB, ends), nn.Linear(ends, width)
        self.second, self.third = nn.Linear(width, width), nn.Linear(width, ends)
        self.head = nn.Linear(ends, classes)
        self.filler, self.segment, self.calls = filler, segment, 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        real = attention_mask.bool()[..., None]
        hidden = self.first(torch.where(real, self.embed(input_ids), self.filler))
        middle = self.middle if self.segment is None else partial(checkpoint, self.middle, **self.segment)
        return self.head(torch.where(real, middle(hidden), 0).sum(1) / real.sum(1))

    def middle(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return self.third(torch.tanh(self.second(torch.tanh(hidden)))).sin()


def pooled_model(
    classes: int,
    filler: float = 0.0,
    segment: dict[str, Any] | None = None,
    targets: tuple[str, ...] = ("first", "second", "third", "head"),
    width: int = 8,
) -> nn.Module:
    """`Pooled` with LoRA on all its linear layers."""
    return tiny.adapt(Pooled(classes, filler, segment, width), targets=targets, r=2)
