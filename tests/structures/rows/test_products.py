"""Rows from streams that are read once, the way of 16-bit streams on a GPU: here on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from laplace_lora_fast import Answers, Classes, InvalidBatchError, LaplaceLoRA, Outputs, Rows
from laplace_lora_fast.likelihoods import Categorical
from laplace_lora_fast.likelihoods.functions import OneSequence
from laplace_lora_fast.structures.rows import products
from laplace_lora_fast.structures.rows.fit import RowAccumulator
from laplace_lora_fast.structures.rows.sketches import sketch
from laplace_lora_fast.weights import LoraWeights
from tests import tiny
from tests.fitting.test_groups import TRAIN, Choices
from tests.kernels.native import sixteen_bit_products
from tests.oracle import assert_close


@pytest.fixture
def read_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """All streams go this way; gives those that did."""
    seen: list[Tensor] = []

    def taken(stream: Tensor) -> bool:
        seen.append(stream)
        return True

    monkeypatch.setattr(products, "are_taken_of", taken)
    yield seen
    assert seen


def rows_of(la: LaplaceLoRA, data: list[Any]) -> list[Tensor]:
    rows: list[Tensor] = la.fit(data, progress=False).posterior.curvature.rows
    return rows


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("padding", ["left", None])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL, ("v_proj", "lm_head")], ids=str)
def test_the_order_of_products_does_not_matter(
    targets: tuple[str, ...], padding: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three answers: two passes. The head sees one token where the others see all."""
    data = tiny.split(tiny.batch(7, 5, padding=padding), 3)
    test = tiny.batch(2, 6, seed=4)

    def run() -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        la = LaplaceLoRA(tiny.tiny_llama(targets=targets), Answers(tiny.ANSWERS), structure=Rows(columns=6))
        return rows_of(la, data), la.logit_distribution(test)

    expected = run()
    monkeypatch.setattr(products, "are_taken_of", lambda stream: True)
    found = run()
    for mine, theirs in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert_close(mine, theirs, 1e-12)


def test_groups_of_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor]:
        return rows_of(
            LaplaceLoRA(tiny.tiny_llama_classifier(1), Choices(), structure=Rows(columns=6)), TRAIN
        )

    expected = run()
    monkeypatch.setattr(products, "are_taken_of", lambda stream: True)
    for mine, theirs in zip(run(), expected, strict=True):
        assert_close(mine, theirs, 1e-12)


def assert_near(rows: Tensor, exact: Tensor) -> None:
    """What two bf16 halves of a map lose, 2^-18 of each entry at most, is about 1.5e-6 of the norm."""
    assert (rows.double() - exact).norm() <= 3e-6 * exact.norm()


class Step:
    """Two sequences of two classes, as far as rows look at them."""

    targets = None

    def __init__(self, shared_inputs: list[int], S: int) -> None:
        self.u, self.shared_inputs = torch.zeros(S, 2), shared_inputs
        self.outputs, self.functions = [self.u], OneSequence(S, Categorical().functions(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_sixteen_bit_streams_lose_nothing_but_their_own_digits(
    dtype: torch.dtype, scale: float, read_once: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against fp64 on the same streams, small adapter weights as well. Pads hold NaN."""
    monkeypatch.setattr(sketch, "_LARGEST", 0.0)  # rows are kept as they are, not in fp16
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    S, T, d, outs, r, m = 3, 40, 96, (64, 64, 80), 8, 32
    layers = [
        LoraWeights(f"l{i}", draw(r, d) / d**0.5, scale * draw(out, r), 2.0) for i, out in enumerate(outs)
    ]
    rows = RowAccumulator(layers, Categorical(), "exact", columns=m, budget=2**30, seed=0)
    xs = {0: draw(S, T, d).to(dtype), 2: draw(S, T, d).to(dtype)}
    gs = [0.1 * draw(S, T, out).to(dtype) for out in outs]
    mask = torch.rand(S, T, generator=generator) < 0.7
    for stream in (*xs.values(), *gs):
        stream[~mask] = torch.nan
    with sixteen_bit_products():
        for _ in range(2):  # a first batch, and another
            for group, x in xs.items():
                rows.observe_input(group, x, mask)
            rows.start(Step([0, 0, 2], S))
            for layer in (2, 1, 0):
                rows.observe_gradient(layer, gs[layer], mask)
            rows.finish_pass()
            rows.finish()
            rows.forget()
    curvature = rows.result()
    assert {omega.dtype for omega in curvature.projections} == {torch.bfloat16}
    for layer, group in enumerate((0, 0, 2)):
        real = mask[..., None]
        x, g = (stream.double().where(real, 0) for stream in (xs[group], gs[layer]))
        of_g, of_x = layers[layer].small_maps
        pair = torch.einsum("str,std->srd", g @ of_g.mT, x), torch.einsum("str,std->srd", x @ of_x.mT, g)
        for side, jacobian in enumerate(pair):
            omega = curvature.projections[2 * layer + side].double()
            exact = torch.cat([(jacobian @ omega).flatten(1)] * 2)
            assert_near(curvature.rows[2 * layer + side], exact)


def test_omega_that_is_more_precise_than_the_streams_is_used_as_it_is(read_once: list[Tensor]) -> None:
    """Of an older file, or a fit in another precision."""
    torch.manual_seed(0)
    layers = [LoraWeights("l", torch.randn(4, 24) / 5, torch.randn(16, 4), 1.0)]
    omegas = [torch.randn(24, 8), torch.randn(16, 8)]
    x, g = torch.randn(2, 9, 24).bfloat16(), torch.randn(2, 9, 16).bfloat16()
    streams = products.ProjectedStreams(layers, omegas)
    assert products.are_taken_of(x)
    with sixteen_bit_products():
        streams.enter(0, [0], x)
        streams.take_input(0, x, None)
        streams.take_gradient(0, 0, g)
        found = dict(streams.rows())
    of_g, of_x = layers[0].small_maps
    small, large = (g.double() @ of_g.mT, x.double() @ of_x.mT), (x.double(), g.double())
    for weight in (0, 1):
        exact = small[weight].mT @ large[weight] @ omegas[weight].double()
        assert_close(found[weight].double(), exact.flatten(1), 8e-6)


@pytest.mark.parametrize("emulated", [False, True])
def test_a_bf16_model_is_fitted_and_asked(emulated: bool, read_once: list[Tensor]) -> None:
    """Whichever way products are made, the numbers are the same to fp32 rounding, and those of fp64 to bf16's."""
    data = tiny.split(tiny.batch(6, 5, classes=2), 3)
    test = tiny.batch(2, 6, seed=4)

    def covariance(dtype: torch.dtype) -> Tensor:
        model = tiny.tiny_llama_classifier(2, dtype=dtype)
        la = LaplaceLoRA(model, Classes(), structure=Rows(columns=6)).fit(data, progress=False)
        return la.logit_distribution(test)[1].double()

    with sixteen_bit_products() if emulated else nullcontext():
        assert_close(covariance(torch.bfloat16), covariance(torch.float64), 0.1)


def test_gradients_of_pads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch has no leak: it is found in the products with the second's pads."""
    monkeypatch.setattr(products, "are_taken_of", lambda stream: True)
    model = tiny.tiny_llama()
    leak = Outputs(lambda output, batch: output.logits[:, batch["input_ids"].shape[1] - 8, :3])
    first, sound = (tiny.batch(4, 8, padding="right", seed=seed) for seed in (1, 2))
    la = LaplaceLoRA(model, leak, structure=Rows(columns=6)).fit([first, sound], progress=False)
    longer = tiny.batch(4, 12, padding="right", seed=3)
    longer["attention_mask"][:, 4:] = 0
    with pytest.raises(InvalidBatchError, match=r"padded positions of layer '.*': pad on the other side"):
        la.fit([first, longer], progress=False)
