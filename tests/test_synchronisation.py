"""No batch waits for the device: fit and predict with the model on the meta device, which stands for a GPU.

Meta tensors have no values, so whatever reads one fails; `NoWaiting` refuses the rest of what makes the host wait for a
GPU. Batches stay on the CPU, as a loader gives them. The first batch may wait: answers move, sketches start, a model is
asked where its positions start.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from laplace_lora_fast import LaplaceLoRA, factors
from laplace_lora_fast.dual import RowAccumulator
from laplace_lora_fast.errors import DeferredChecks
from laplace_lora_fast.fit import Objective
from laplace_lora_fast.kfac import FactorKind, FactorPlan, Kfac, KfacAccumulator
from laplace_lora_fast.likelihoods import Fisher, contrast_cotangents
from laplace_lora_fast.moments import DiagAccumulator, EkfacAccumulator
from laplace_lora_fast.predictive import LinearisedModel, distribution, map_logits
from laplace_lora_fast.refit import RefitAccumulator
from laplace_lora_fast.taps import find_sites
from tests import tiny

aten = torch.ops.aten
GPU = torch.device("meta")
EAGER = {"attn_implementation": "eager"}  # transformers' masks for SDPA read values of the mask
SIZED_BY_VALUES = (
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten._unique2,
    aten.unique_dim,
    aten.bincount,
)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class Waits(Exception):
    """An operation that would make the host wait for the GPU."""


class NoWaiting(TorchDispatchMode):
    """Refuses blocking copies between devices, and operations on the GPU for which the host has to know values."""

    def __enter__(self) -> NoWaiting:
        self._patches = ExitStack()
        for name in ("tensor", "as_tensor"):  # these copy behind the back of a dispatch mode
            self._patches.enter_context(mock.patch.object(torch, name, _made_elsewhere(getattr(torch, name))))
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        if any(tensor.device == GPU for tensor in tensors):
            self._check(func, args, kwargs, tensors)
        return out

    def _check(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        packet, elsewhere = func.overloadpacket, [t for t in tensors if t.device != GPU]
        if packet in (aten._to_copy, aten.copy_):
            asynchronous = kwargs.get("non_blocking", False) or (packet is aten.copy_ and args[2:] == (True,))
            if elsewhere and not (asynchronous and tensors[-1].device == GPU):
                raise Waits(f"{func} blocks")
        elif any(tensor.dim() > 0 for tensor in elsewhere) or (elsewhere and packet is aten.where):
            raise Waits(f"{func} takes tensors of two devices")
        elif packet in SIZED_BY_VALUES:
            raise Waits(f"{func} reads values")
        elif packet in INDEXING and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            raise Waits(f"{func} counts a boolean index")


def _made_elsewhere(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor`, unless it takes values from the host to the GPU; transformers' own masks do that."""

    def made(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        caller = sys._getframe(1).f_globals["__name__"]
        to_gpu = kwargs.get("device") is not None and torch.device(kwargs["device"]) == GPU
        if to_gpu and not isinstance(data, Tensor) and not caller.startswith("transformers."):
            raise Waits("values are copied from pageable memory")
        return make(data, *args, **kwargs)

    return made


class EndOfData(Exception):
    """Ends a pass over the data: what comes after the last batch may wait."""


def watched(batches: list[tiny.Batch]) -> Iterator[tiny.Batch]:
    """The batches; from the second one on nothing may wait."""
    yield batches[0]
    with NoWaiting():
        yield from batches[1:]
    raise EndOfData


@pytest.fixture(autouse=True)
def autocast_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has no autocast."""
    for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
        real = getattr(torch, name)

        def on_cpu(device_type: str, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            return real("cpu" if device_type == "meta" else device_type, *args, **kwargs)

        monkeypatch.setattr(torch, name, on_cpu)


def decoder() -> nn.Module:
    return tiny.tiny_llama(torch.float32, ("q_proj", "v_proj", "lm_head"), config=EAGER | {"hidden_size": 64})


def with_answers(model: nn.Module) -> LaplaceLoRA:
    """On the GPU, behind a first batch on the CPU, which finds out where the model's positions start."""
    la = LaplaceLoRA(model, answer_token_ids=tiny.ANSWERS)
    inputs = la._head.inputs(data()[0], torch.device("cpu"), DeferredChecks())
    la._head.placed(la.model, inputs)
    la.sites = find_sites(la.model.to(GPU), la._head)
    return la


def objective(la: LaplaceLoRA, fisher: Fisher = Fisher.EXACT) -> Objective:
    return Objective(la.model, la._head, la.sites, la.likelihood, fisher, 2, 0)


def data(padded: bool = True) -> list[tiny.Batch]:
    """Always with a mask: without one transformers looks for packed sequences, and waits."""
    batch = tiny.batch(12, 5, padding="left" if padded else None)
    return tiny.split({"attention_mask": torch.ones_like(batch["input_ids"])} | batch, 3)


def on_gpu(la: LaplaceLoRA) -> LinearisedModel:
    """A fitted model, moved with everything its predictions need."""
    with la._linearised() as linearised:
        curvature = linearised.curvature
    names, tensors = curvature.names, curvature.tensors()
    moved = type(curvature).from_tensors(curvature.structure, names, tensors, [GPU] * len(names))
    la.sites = find_sites(la.model.to(GPU), la._head)
    return replace(linearised, sites=la.sites, curvature=moved)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind", ["dense", "sketch"])
@pytest.mark.parametrize("tokens", [0, 1000])
@pytest.mark.parametrize("kfac", ["expand", "reduce"])
def test_kfac_fit(kfac: str, kind: str, tokens: int, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "tokens_worth_an_update", lambda device: tokens)
    la = with_answers(decoder())
    kfac_factors = KfacAccumulator(la.sites, Kfac(kfac), FactorPlan(FactorKind(kind), sketch_size=8), None)
    with pytest.raises(EndOfData):
        objective(la).accumulate(watched(data(padded)), kfac_factors, "fit", False)


@pytest.mark.parametrize("fisher", [Fisher.MC, Fisher.EMPIRICAL])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_other_fishers(fisher: Fisher, likelihood: str) -> None:
    model = tiny.tiny_llama_classifier(1 if likelihood == "regression" else 3, torch.float32, config=EAGER)
    la = LaplaceLoRA(model.to(GPU), likelihood)
    batches = tiny.split(tiny.batch(9, 5, classes=3 if likelihood == "classification" else 0), 3)
    kfac_factors = KfacAccumulator(la.sites, Kfac.REDUCE, FactorPlan(), None)
    with pytest.raises(EndOfData):
        objective(la, fisher).accumulate(watched(batches), kfac_factors, "fit", False)


@pytest.mark.parametrize("structure", ["ekfac", "diag", "dual", "refit"])
def test_fit_of_other_structures(structure: str) -> None:
    la = LaplaceLoRA(decoder(), answer_token_ids=tiny.ANSWERS, kfac="reduce", rank=4)
    kfac = on_gpu(la.fit(data(), progress=False)).curvature
    accumulators: dict[str, Callable[[], Any]] = {
        "ekfac": lambda: EkfacAccumulator(la.sites, kfac),  # type: ignore[arg-type]
        "diag": lambda: DiagAccumulator(la.sites),
        "dual": lambda: RowAccumulator(la.sites, 8, 2**30, 0),
        "refit": lambda: RefitAccumulator(la.sites, 8, 2**30, 0),
    }
    with pytest.raises(EndOfData):
        objective(la).accumulate(watched(data()), accumulators[structure](), "fit", False)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diag", "dual"])
def test_predict(structure: str, classes: int) -> None:
    """Under several priors, some of them equal."""
    model = tiny.tiny_llama_classifier(classes, torch.float32, config=EAGER)
    batches = tiny.split(tiny.batch(9, 5, classes=classes), 3)
    low_rank = {"rank": 4} if "kfac" in structure else {}
    la = LaplaceLoRA(model, structure=structure, **low_rank).fit(batches, progress=False)
    priors = torch.stack([la._resolve(value) for value in (1.0, {"A": 1.0, "B": 3.0}, 3.0)], 1)
    with pytest.raises(EndOfData):
        distribution(on_gpu(la), priors, watched(batches), contrast_cotangents(classes), "predict", False)


def test_predict_with_answers_and_plain_logits() -> None:
    la = LaplaceLoRA(decoder(), answer_token_ids=tiny.ANSWERS).fit(data(), progress=False)
    linearised, priors = on_gpu(la), la._resolve(1.0)[:, None]
    with pytest.raises(EndOfData):
        distribution(linearised, priors, watched(data()), contrast_cotangents(3), "predict", False)
    with pytest.raises(EndOfData):
        map_logits(linearised, watched(data()), False)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.cpu(),
        lambda x: torch.ones(3).to(x.device),
        lambda x: torch.zeros(3, device=x.device).copy_(torch.ones(3)),
        lambda x: x[torch.tensor([0, 2])],
        lambda x: torch.tensor(0.0, device=x.device),
        lambda x: torch.as_tensor([1, 2], device=x.device),
        lambda x: bool(x.isfinite().all()),
    ],
)
def test_what_waits_is_noticed(wait: Callable[[Tensor], object]) -> None:
    """The tests above would prove nothing otherwise."""
    x = torch.ones(3, device=GPU)
    with NoWaiting(), pytest.raises((Waits, RuntimeError, NotImplementedError)):
        wait(x)
