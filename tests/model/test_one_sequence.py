"""Batches of one sequence: whatever a layer sees is that sequence's, in any architecture; against autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from laplace_lora_fast import Classes, LaplaceLoRA, Rows
from tests import tiny

SMALL = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": 3,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def deberta() -> nn.Module:
    """Keys and queries of content and of relative positions share their projections, as in published models."""
    torch.manual_seed(0)
    config = transformers.DebertaV2Config(
        **SMALL,
        relative_attention=True,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        max_relative_positions=8,
    )
    return tiny.adapt(
        transformers.DebertaV2ForSequenceClassification(config),
        targets=("query_proj", "key_proj", "value_proj"),
    )


def albert() -> nn.Module:
    """All layers are one."""
    torch.manual_seed(0)
    config = transformers.AlbertConfig(**SMALL, embedding_size=16)
    return tiny.adapt(transformers.AlbertForSequenceClassification(config), targets=("query", "key", "ffn"))


def sequences(n: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 8, (n,), generator=generator).tolist()
    return [{"input_ids": torch.randint(1, 48, (1, length), generator=generator)} for length in lengths]


def covariance(model: nn.Module, train: list, test: dict, prior: float) -> torch.Tensor:
    weights = [p for name, p in model.named_parameters() if "lora_" in name]
    for weight in weights:
        weight.requires_grad_(True)

    def rows(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model.eval()(**batch).logits[0]
        grads = [torch.autograd.grad(f, weights, retain_graph=True) for f in logits]
        return logits.detach(), torch.stack([torch.cat([g.flatten() for g in each]) for each in grads])

    hessian = prior * torch.eye(sum(w.numel() for w in weights), dtype=torch.float64)
    for batch in train:
        f, J = rows(batch)
        p = f.softmax(0)
        hessian += J.mT @ (torch.diag(p) - torch.outer(p, p)) @ J
    J = rows(test)[1]
    return J @ torch.linalg.solve(hessian, J.mT)


@pytest.mark.parametrize("make", [deberta, albert])
def test_against_autograd(make: Callable[[], nn.Module]) -> None:
    model, train, (test,) = make(), sequences(4, 0), sequences(1, 1)
    la = LaplaceLoRA(model, Classes(), structure=Rows(columns=1 << 20), prior_precision=0.5)
    found = la.fit(train, progress=False).logit_distribution(test)[1][0]
    expected = covariance(model, train, test, 0.5)
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()  # softmax in fp32 inside


def test_keys_that_sequences_share_in_larger_batches() -> None:
    """DeBERTa's see relative positions once for all sequences: their Jacobians come from autograd."""
    model, ids = deberta(), torch.randint(1, 48, (6, 5), generator=torch.Generator().manual_seed(0))
    la = LaplaceLoRA(model, Classes(), structure=Rows(columns=1 << 20), prior_precision=0.5)
    la.fit([{"input_ids": ids[:4]}], progress=False)
    found = la.logit_distribution({"input_ids": ids[4:]})[1]
    singles = [{"input_ids": each[None]} for each in ids]
    expected = torch.stack([covariance(model, singles[:4], test, 0.5) for test in singles[4:]])
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()  # softmax in fp32 inside


def test_shared_layers_in_larger_batches() -> None:
    """ALBERT's layers see rows of the batch in each of their uses: the sum over uses is exact there too."""
    data = tiny.batch(6, length=6, seed=1, padding="right")
    results = []
    for size in (2, 6):
        la = LaplaceLoRA(albert(), Classes(), structure=Rows(columns=64)).fit(
            tiny.split(data, size), progress=False
        )
        results.append(la.logit_distribution(data)[1])
    assert torch.allclose(*results, rtol=1e-6)
