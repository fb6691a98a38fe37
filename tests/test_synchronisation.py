"""No batch waits for the device: fit and predict with the model on the meta device, which stands for a GPU.

Meta tensors have no values, so whatever reads one fails; `NoWaiting` refuses the rest of what makes the host wait for a
GPU. Batches stay on the CPU, as a loader gives them. The first batch may wait: answers move, sketches start, a model is
asked where its positions start.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from laplace_lora_fast import (
    EKFAC,
    KFAC,
    Answers,
    Classes,
    Diagonal,
    LaplaceLoRA,
    MonteCarlo,
    Outputs,
    Regression,
    Rows,
)
from laplace_lora_fast.fitting.fit import Tally
from laplace_lora_fast.fitting.passes import Subject, run
from laplace_lora_fast.model.lora import lora_layers
from laplace_lora_fast.prediction import LinearisedModel, distribution, plain_answers
from laplace_lora_fast.ranks import Ranks
from laplace_lora_fast.structures import Structure
from laplace_lora_fast.structures.base import Problem
from laplace_lora_fast.structures.blocks import factors
from laplace_lora_fast.tasks import Task
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


LAST = Outputs(lambda output, _: output.logits[:, -1, :3])


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


def data(padded: bool = True) -> list[tiny.Batch]:
    """Always with a mask: without one transformers looks for packed sequences, and waits."""
    batch = tiny.batch(12, 5, padding="left" if padded else None)
    return tiny.split({"attention_mask": torch.ones_like(batch["input_ids"])} | batch, 3)


def moved(la: LaplaceLoRA) -> Subject:
    """Its model on the GPU, where no first batch can be proved: that has been done before."""
    layers = lora_layers(la.model.to(GPU), la._head)
    return Subject(la.model, la._head, layers, la.likelihood)


def with_answers(model: nn.Module, structure: Structure) -> LaplaceLoRA:
    return LaplaceLoRA(model, Answers(tiny.ANSWERS), structure=structure)


def rebuilt(la: LaplaceLoRA) -> Any:
    """Its curvature on the GPU."""
    fit, _ = la.snapshot()
    names, tensors = fit.curvature.names, fit.curvature.tensors()
    return fit.structure.rebuild(names, tensors, [GPU] * len(names), la.likelihood)


def linearised(la: LaplaceLoRA) -> LinearisedModel:
    """A fitted model on the GPU with all that its predictions need."""
    (fit, _), curvature = la.snapshot(), rebuilt(la)
    return LinearisedModel(moved(la), fit.structure, curvature, fit.shared_inputs, fit.n_outputs)


def watch_fit(la: LaplaceLoRA, batches: list[tiny.Batch], before: Any = None) -> None:
    """The last pass of a fit, up to what comes after the last batch.

    Args:
        la: the model and the structure; still on the CPU.
        batches: the data.
        before: result of the pass before.
    """
    structure = la.structure
    assert isinstance(structure, Structure)
    subject = moved(la.fit(batches[:1], progress=False))
    weights = [layer.weights for layer in subject.layers]
    problem = Problem(weights, la.likelihood, budget=2**30, seed=0, ranks=Ranks(None))
    listener = structure.stages(problem)[-1].accumulator(before)
    with pytest.raises(EndOfData):
        run(subject, watched(batches), listener, Tally([]).count, generator=torch.Generator())


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind", [{"factors": "dense"}, {"factors": "sketch", "columns": 8}], ids=str)
@pytest.mark.parametrize("waiting", [0, 1000])
@pytest.mark.parametrize("tokens", ["expand", "reduce", "paper"])
def test_kfac_fit(
    tokens: str, waiting: int, kind: dict[str, Any], padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factors, "tokens_worth_an_update", lambda device: waiting)
    if tokens == "paper":  # refuses a head that sees the last position only
        la = LaplaceLoRA(decoder(), LAST, structure=KFAC(tokens, **kind))
    else:
        la = with_answers(decoder(), KFAC(tokens, **kind))
    watch_fit(la, data(padded))


@pytest.mark.parametrize("fisher", [MonteCarlo(2), "empirical"])
@pytest.mark.parametrize("structure", [KFAC, Diagonal, Rows])
@pytest.mark.parametrize("task", [Classes(), Regression()])
def test_other_fishers(task: Task, structure: Any, fisher: Any) -> None:
    regression = isinstance(task, Regression)
    model = tiny.tiny_llama_classifier(1 if regression else 3, torch.float32, config=EAGER)
    batches = tiny.split(tiny.batch(9, 5, classes=0 if regression else 3), 3)
    watch_fit(LaplaceLoRA(model, task, structure=structure(fisher=fisher)), batches)


OTHERS = [Diagonal(), Rows(columns=8), Rows(columns=8, refit=True)]


@pytest.mark.parametrize("structure", OTHERS, ids=repr)
def test_fit_of_other_structures(structure: Structure) -> None:
    watch_fit(with_answers(decoder(), structure), data())


def test_second_pass_of_ekfac() -> None:
    structure = EKFAC(rank=4)
    la = with_answers(decoder(), structure)
    kfac = rebuilt(with_answers(la.model, KFAC(rank=4)).fit(data(), progress=False))
    watch_fit(la, data(), kfac)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("structure", [KFAC(rank=4), EKFAC(rank=4), *OTHERS], ids=repr)
def test_predict(structure: Structure, classes: int) -> None:
    """Under several priors, some of them equal."""
    model = tiny.tiny_llama_classifier(classes, torch.float32, config=EAGER)
    batches = tiny.split(tiny.batch(9, 5, classes=classes), 3)
    la = LaplaceLoRA(model, Classes(), structure=structure).fit(batches, progress=False)
    priors = torch.stack([la._resolve(value) for value in (1.0, {"A": 1.0, "B": 3.0}, 3.0)], 1)
    with pytest.raises(EndOfData):
        distribution(linearised(la), priors, watched(batches))


def test_predict_with_answers_and_plain_answers() -> None:
    la = with_answers(decoder(), KFAC()).fit(data(), progress=False)
    on_gpu, priors = linearised(la), torch.ones(len(la.layers) * 2, 1, dtype=torch.float64)
    for plain_outputs in (False, True):
        with pytest.raises(EndOfData):
            distribution(on_gpu, priors, watched(data()), plain_outputs=plain_outputs)
    with pytest.raises(EndOfData):
        plain_answers(on_gpu, watched(data()), False)


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
