"""Sums over real tokens as products, the way of 16-bit streams on a GPU: here on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laplace_lora_fast import KFAC, Answers, InvalidBatchError, LaplaceLoRA, NumericalError, Outputs
from laplace_lora_fast.errors import DeferredChecks
from laplace_lora_fast.likelihoods import Categorical
from laplace_lora_fast.likelihoods.functions import OneSequence
from laplace_lora_fast.structures.blocks.kfac import FactorKind, FactorPlan, KfacAccumulator, TokenSharing
from laplace_lora_fast.structures.blocks.token_sums import TokenSums
from laplace_lora_fast.weights import LoraWeights
from tests import tiny
from tests.kernels.native import sixteen_bit_products
from tests.oracle import assert_close

S, T, D, OUTS, R = 3, 40, 48, (32, 32, 40), 4
GROUPS = [0, 0, 2]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The streams that went this way, by number."""
    seen: list[int] = []
    take = TokenSums.take

    def watched(self: TokenSums, index: int, x: Tensor, mask: Tensor) -> object:
        seen.append(index)
        return take(self, index, x, mask)

    monkeypatch.setattr(TokenSums, "take", watched)
    return seen


class Step:
    """Sequences of two classes, as far as KFAC looks at them."""

    def __init__(self) -> None:
        self.u, self.shared_inputs = torch.zeros(S, 2), GROUPS
        self.outputs, self.functions = [self.u], OneSequence(S, Categorical().functions(2))

    def fisher(self, fisher: object) -> list[Tensor]:
        return [torch.zeros(S, 2, 1)]


class Streams:
    """Batches of random streams for three layers, two of which share their input."""

    def __init__(self, dtype: torch.dtype, factors: FactorKind = FactorKind.DENSE) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(0), dtype
        layers = [LoraWeights(f"l{i}", self.draw(R, D), self.draw(out, R), 2.0) for i, out in enumerate(OUTS)]
        plan = FactorPlan(factors, sketch_size=64)
        self.kfac = KfacAccumulator(layers, "exact", TokenSharing.REDUCE, plan, None)
        self.rows: dict[str, list[Tensor]] = {}

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def show(self, filler: float | None, passes: int = 1) -> None:
        """A batch whose pads hold the filler, or what they happen to."""
        mask = torch.rand(S, T, generator=self.generator) < 0.6
        for group in (0, 2):
            x = self.stream(D, mask, filler)
            self.rows.setdefault(f"x{group}", []).append(mean(x, mask))
            self.kfac.observe_input(group, x, mask)
        self.kfac.start(Step())
        for _ in range(passes):
            for layer in (2, 1, 0):
                g = self.stream(OUTS[layer], mask, filler)
                self.rows.setdefault(f"g{layer}", []).append(real(g, mask).sum(1))
                self.kfac.observe_gradient(layer, g, mask)
            self.kfac.finish_pass()
        self.kfac.finish()
        self.kfac.forget()

    def stream(self, dim: int, mask: Tensor, filler: float | None) -> Tensor:
        x = self.draw(S, T, dim).to(self.dtype)
        if filler is not None:
            x[~mask] = filler
        return x

    def require_right(self, tolerance: float = 1e-5) -> None:
        """Against fp64 sums of the same streams."""
        found = {f"x{group}": factor for group, factor in self.kfac._inputs.items()}
        found |= {f"g{layer}": factor for layer, factor in enumerate(self.kfac._gradients)}
        for name, factor in found.items():
            rows = torch.cat(self.rows[name])
            identity = torch.eye(factor.dim, dtype=torch.float64)
            assert_close(factor.quadratic(identity), rows.mT @ rows, tolerance)


def real(x: Tensor, mask: Tensor) -> Tensor:
    return x.double().where(mask[..., None], 0)


def mean(x: Tensor, mask: Tensor) -> Tensor:
    return real(x, mask).sum(1) / mask.sum(1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batches", [3, 12])  # 36 sequences do not wait in all factors
def test_sums_are_those_of_the_real_tokens(dtype: torch.dtype, batches: int, products: list[int]) -> None:
    with sixteen_bit_products():
        streams = Streams(dtype)
        for _ in range(batches):
            streams.show(None, passes=2)
        assert len(products) == (batches - 1) * (2 + 2 * 3)  # the first batch is looked at
        streams.require_right()


def test_pads_that_are_not_finite_are_selected_away(products: list[int]) -> None:
    """As long as the first batch says that they are to be expected."""
    with sixteen_bit_products():
        streams = Streams(torch.bfloat16)
        for filler in (torch.nan, None, torch.inf):
            streams.show(filler)
        assert not products
        streams.require_right()


@pytest.mark.parametrize("factors", [FactorKind.DENSE, FactorKind.SKETCH])
def test_pads_that_are_not_finite_later_end_the_fit(factors: FactorKind, products: list[int]) -> None:
    with sixteen_bit_products():
        streams = Streams(torch.bfloat16, factors)
        streams.show(None)
        streams.show(torch.nan)
        assert products
        with pytest.raises(NumericalError, match="layer 'l0' is not finite"):
            streams.kfac.result()


def test_a_batch_that_failed_leaves_no_trace(products: list[int]) -> None:
    with sixteen_bit_products():
        streams = Streams(torch.bfloat16)
        streams.show(None)
        mask = torch.ones(S, T, dtype=torch.bool)
        streams.kfac.observe_input(0, torch.full((S, T, D), torch.nan).bfloat16(), mask)
        streams.kfac.forget()
        streams.show(None)
        streams.require_right()


@pytest.fixture(params=["at once", "deferred"])
def deferred(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether conditions are read at the end, as on a GPU."""
    if request.param == "deferred":
        monkeypatch.setattr(DeferredChecks, "require", DeferredChecks._pend)


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("non_finite", ["raise", "skip"])
def test_gradients_of_pads_are_refused(non_finite: str, products: list[int]) -> None:
    """The first batch with pads has no leak: it is found in what the sums have made of the pads of the second."""
    model = tiny.tiny_llama(torch.bfloat16)
    leak = Outputs(lambda output, batch: output.logits[:, batch["input_ids"].shape[1] - 8, :3])
    first, sound = (tiny.batch(4, 8, padding="right", seed=seed) for seed in (1, 2))
    with sixteen_bit_products():
        la = LaplaceLoRA(model, leak, structure=KFAC(factors="dense"))
        la.fit([first, sound], progress=False, non_finite=non_finite)
        longer = tiny.batch(4, 12, padding="right", seed=3)
        longer["attention_mask"][:, 4:] = 0
        with pytest.raises(InvalidBatchError, match=r"padded positions of layer '.*': pad on the other side"):
            la.fit([first, longer], progress=False, non_finite=non_finite)
    assert products


def test_a_bf16_model_is_fitted_as_by_selection(products: list[int]) -> None:
    data = tiny.split(tiny.batch(9, 7, padding="left"), 3)

    def factors(emulated: bool) -> list[Tensor]:
        model = tiny.tiny_llama(torch.bfloat16)
        la = LaplaceLoRA(model, Answers(tiny.ANSWERS), structure=KFAC(factors="dense"))
        with sixteen_bit_products() if emulated else torch.no_grad():
            la.fit(data, progress=False)
        kept = [weight for layer in la.factors.values() for weight in (layer.A, layer.B)]
        return [factor for weight in kept for factor in (weight.input_factor, weight.gradient_factor)]

    for found, expected in zip(factors(True), factors(False), strict=True):
        assert_close(found.double(), expected.double(), 1e-4)
    assert products
