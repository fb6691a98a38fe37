"""One small classification problem, and its GGN as dense matrices over all weights."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_lora_fast import Classes, LaplaceLoRA
from laplace_lora_fast.structures import Structure
from tests import oracle, tiny

TRAIN = tiny.batch(7, length=6, seed=1, padding="right")
TEST = tiny.batch(3, length=5, seed=2, labels=False, padding="right")
LAYERS = "base_model.model.model.layers."
PRIORS = {
    "all": 0.7,
    "side": {"A": 0.3, "B": 2.0},
    "layer": {f"{LAYERS}{i}.self_attn.{p}_proj": 0.5 + i + (p == "v") for i in (0, 1) for p in "qv"},
}


def model_of(classes: int) -> torch.nn.Module:
    return tiny.tiny_llama_classifier(classes)


def fitted(
    model: torch.nn.Module, structure: Structure | str, classes: int = 3, **options: object
) -> LaplaceLoRA:
    data = TRAIN | {"labels": TRAIN["labels"] % classes}
    la = LaplaceLoRA(model, Classes(), structure=structure, **options)
    return la.fit(tiny.split(data, 3), progress=False)


def fisher_rows(model: torch.nn.Module, classes: int, fisher: str) -> dict[tuple[str, str], Tensor]:
    """Fisher-weighted Jacobian rows [R, P] of every weight."""
    data = TRAIN | {"labels": TRAIN["labels"] % classes}
    jacobians = oracle.jacobians(model, data, oracle.class_logits)
    cotangents = oracle.exact_cotangents if fisher == "exact" else oracle.empirical_cotangents
    singles = oracle.examples(data)
    roots = [cotangents(oracle.class_logits(model, single).detach(), single) for single in singles]
    return {
        key: torch.cat([r.mT @ j for r, j in zip(roots, js, strict=True)]) for key, js in jacobians.items()
    }


def precisions_of(la: LaplaceLoRA) -> dict[tuple[str, str], float]:
    return dict(zip(la.posterior.curvature.names, la.posterior.prior_precision.tolist(), strict=True))


def dense_ggn(la: LaplaceLoRA, rows: dict[tuple[str, str], Tensor]) -> tuple[Tensor, Tensor]:
    """H + Lambda over all weights, and Lambda's diagonal."""
    phi = torch.cat(list(rows.values()), 1)
    lams = precisions_of(la)
    diagonal = torch.cat([torch.full((js.shape[1],), lams[key], dtype=phi.dtype) for key, js in rows.items()])
    return phi.mT @ phi + torch.diag(diagonal), diagonal
