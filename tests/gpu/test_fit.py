"""Fits and predictions on a GPU: against fp64 on the CPU, and without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks

import laplace_kernels as lk
from laplace_lora_fast import KFAC, Answers, Diagonal, LaplaceLoRA, Rows
from laplace_lora_fast.structures import Structure
from laplace_lora_fast.structures.blocks.factors import DenseFactor, flush_full
from tests import tiny
from tests.kernels import oracles
from tests.oracle import assert_close


def decoder(dtype: torch.dtype):
    """Wide enough for the tokens of small batches to wait for each other."""
    config = {"hidden_size": 64, "intermediate_size": 96}
    return tiny.tiny_llama(dtype, ("q_proj", "v_proj", "down_proj"), config=config)


def fitted(model, loader, structure: Structure) -> LaplaceLoRA:
    return LaplaceLoRA(model, Answers(tiny.ANSWERS), structure=structure).fit(loader, progress=False)


@pytest.fixture
def group_sizes(monkeypatch) -> list[int]:
    """The sizes of the groups in which factors are updated."""
    sizes, gram_group_ = [], lk.gram_group_

    def recorded(Cs, Xs):
        sizes.append(len(Cs))
        gram_group_(Cs, Xs)

    monkeypatch.setattr(lk, "gram_group_", recorded)
    return sizes


@pytest.mark.parametrize("tokens", ["expand", "reduce"])
@pytest.mark.parametrize("loader_on", ["cpu", "cuda"])
def test_fit_and_predict_equal_fp64_on_the_cpu(backend, group_sizes, tokens, loader_on):
    train, test = tiny.batch(24, 5, seed=1), tiny.batch(4, 5, seed=2)
    structure = KFAC(tokens=tokens, factors="dense")
    expected = fitted(decoder(torch.float64), [train], structure)
    model = decoder(torch.float32).cuda()
    loader = [{k: v.to(loader_on) for k, v in batch.items()} for batch in tiny.split(train, 2)]
    found = fitted(model, loader, structure)
    assert max(group_sizes, default=0) > 1
    for name, layer in expected.factors.items():
        for side in "AB":
            ours, oracle = getattr(found.factors[name], side), getattr(layer, side)
            assert_close(ours.input_factor.cpu().double(), oracle.input_factor, 1e-3)
            assert_close(ours.gradient_factor.cpu().double(), oracle.gradient_factor, 1e-3)
    mean, cov = (part.cpu().double() for part in found.logit_distribution(test))
    expected_mean, expected_cov = expected.logit_distribution(test)
    assert_close(mean, expected_mean, 1e-3)
    assert_close(cov, expected_cov, 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tokens_that_waited(backend, group_sizes, dtype):
    """As they come for a model in half precision, NaN in the pads; three factors in one launch, three times."""
    generator = torch.Generator().manual_seed(0)
    made = [DenseFactor(d, torch.float32, torch.device("cuda")) for d in (130, 136, 144)]
    seen: list[list[torch.Tensor]] = [[], [], []]
    for _ in range(6):
        keep = torch.rand(3, 10, generator=generator) < 0.7
        for factor, parts in zip(made, seen, strict=True):
            x = torch.randn(3, 10, factor.dim, generator=generator).to(dtype)
            parts.append(x[keep])
            x = x.masked_fill(~keep[..., None], torch.nan)
            factor.add_tokens(x.cuda(), keep.cuda())
        flush_full(made)
    assert group_sizes == [3, 3, 3]
    for factor, parts in zip(made, seen, strict=True):
        oracles.assert_near(factor.lower.tril().cpu(), oracles.gram(torch.cat(parts)).tril(), 5e-5)


def watched(batches: list[tiny.Batch]) -> Iterator[tiny.Batch]:
    """The batches; from the second one on nothing may wait for the device."""
    yield batches[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield from batches[1:]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def patience(monkeypatch) -> Iterator[None]:
    """Transformers may wait when it makes its attention masks, and after a test that failed anything may."""

    def patient(*args, make, **kwargs):
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return make(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    for kind in ("eager", "sdpa"):
        monkeypatch.setitem(masks, kind, partial(patient, make=masks[kind]))
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize(
    "structure",
    [
        KFAC(tokens="expand", factors="dense"),
        KFAC(tokens="reduce", factors="dense"),
        KFAC(tokens="expand", factors="sketch", columns=8),
        KFAC(fisher="mc"),
        Rows(fisher="mc"),
        Diagonal(),
        Rows(),
    ],
    ids=str,
)
def test_no_batch_waits_for_the_device(backend, structure):
    model = decoder(torch.float32).cuda()
    batches = tiny.split(tiny.batch(24, 5), 3)
    fitted(model, batches, structure)  # compiles
    la = fitted(model, watched(batches), structure)
    la.predictions(batches, progress=False)
    la.predictions(watched(batches), progress=False)


@pytest.mark.parametrize("budget", [2 * 10**4, 1], ids=["pinned", "files"])
def test_rows_that_leave_the_device(budget):
    """The same rows, and the same predictions, wherever they live."""
    train, test = tiny.batch(24, 5, seed=1), tiny.batch(4, 5, seed=2)
    model, found = decoder(torch.bfloat16).cuda(), []
    for kept in (None, budget):
        la = LaplaceLoRA(model, Answers(tiny.ANSWERS), structure=Rows(columns=8), budget=kept)
        la.fit(tiny.split(train, 4), progress=False)
        samples = la.posterior.sample(3, torch.Generator().manual_seed(0))
        found.append((la.posterior.curvature.rows, [*la.logit_distribution(test), *samples]))
    (near, expected), (far, moved) = found
    assert {rows.device.type for rows in near} == {"cuda"}
    assert {rows.device.type for rows in far} == {"cpu"}
    assert all(rows.is_pinned() for rows in far) == (budget > 1)
    for mine, theirs in zip(far, near, strict=True):
        assert torch.equal(mine, theirs.cpu())
    for mine, theirs in zip(moved, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
