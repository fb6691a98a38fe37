"""The state a model is put in while it is tapped, and what gradient checkpointing means for it."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from laplace_lora_fast.devices import device_of

T = TypeVar("T")

_NOTHING = nullcontext()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and the data-parallel wrappers, which prefix the names of its layers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def undistributed(model: nn.Module) -> nn.Module:
    """The model to call: not through DistributedDataParallel, whose forward passes wait for those of other ranks."""
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, nn.parallel.DistributedDataParallel):
        called: nn.Module = inner.module
        return called
    return model


def checkpointing_layers(model: nn.Module) -> list[nn.Module]:
    """Modules that transformers' gradient checkpointing is switched on for."""
    return [module for module in model.modules() if vars(module).get("gradient_checkpointing", False)]


def input_embeddings(model: nn.Module) -> nn.Module:
    """Of the outermost module that knows them: `model` may be a plain wrapper."""
    owner = next(module for module in model.modules() if hasattr(module, "get_input_embeddings"))
    embedding: nn.Module = owner.get_input_embeddings()  # type: ignore[operator]
    return embedding


def reentrant(checkpointing: list[nn.Module]) -> bool:
    """Whether any of them checkpoints reentrantly: its segments then need an input that requires grad."""
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in checkpointing)
    return any(getattr(function, "keywords", {}).get("use_reentrant", False) for function in functions)


class Caller:
    """The autocast in force now, on the model's device, and the caller's default device, to be entered again later.

    Attributes:
        device: kind of the model's.
        casts: whether there is an autocast.
    """

    def __init__(self, model: nn.Module) -> None:
        self.device = device_of(model).type
        self.casts = torch.is_autocast_enabled(self.device)
        self._dtype, self._default = torch.get_autocast_dtype(self.device), _DEFAULT_DEVICE.get()
        self._stacks: list[ExitStack] = []

    def autocast(self) -> torch.autocast:
        """Its autocast alone."""
        return torch.autocast(self.device, self._dtype, self.casts)

    def without_casts(self) -> AbstractContextManager[Any]:
        """The default device alone."""
        return nullcontext() if self._default is None else self._default

    def __enter__(self) -> None:
        stack = ExitStack()
        stack.enter_context(self.autocast())
        stack.enter_context(self.without_casts())
        self._stacks.append(stack)

    def __exit__(self, *exc: object) -> None:
        self._stacks.pop().close()


_DEFAULT_DEVICE: ContextVar[torch.device | None] = ContextVar("default device of the caller", default=None)


@contextmanager
def undisturbed() -> Iterator[None]:
    """What is computed here depends on no mode of the caller's: no inference mode, new tensors on the CPU.

    The model runs with the caller's default device: see `Caller`.
    """
    default = torch.get_default_device()
    with torch.inference_mode(False):
        if default.type == "cpu":
            yield
            return
        token = _DEFAULT_DEVICE.set(default)
        try:
            with torch.device("cpu"):
                yield
        finally:
            _DEFAULT_DEVICE.reset(token)


def undisturbed_methods(kind: type[T]) -> type[T]:
    """Decorator of a class: its public methods and its constructor run `undisturbed`."""
    for name, member in list(vars(kind).items()):
        if name.startswith("_") and name != "__init__":
            continue
        if inspect.isfunction(member):
            setattr(kind, name, undisturbed()(member))
        elif isinstance(member, classmethod):
            setattr(kind, name, classmethod(undisturbed()(member.__func__)))
    return kind


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """No autocast inside; to enter one that changes nothing would take microseconds at every layer."""
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else _NOTHING


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps a parameter elsewhere, and fetches it for the forward pass only."""
    hooked = any(hasattr(part, "_hf_hook") for part in module.modules())
    return hooked and any(parameter.is_meta for parameter in module.parameters())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for every module, whatever keeps some in training mode otherwise."""
    were_training = [module for module in model.modules() if module.training]
    try:
        for module in were_training:
            module.training = False
        yield
    finally:
        for module in were_training:
            module.training = True


@contextmanager
def checkpointed(layers: Sequence[nn.Module], is_own: Callable[[], bool]) -> Iterator[None]:
    """Layers that checkpoint in evaluation mode, in passes of one's own.

    transformers checkpoints layers in training mode only. Left in it, they would drop what their own code or their
    configuration says; so the checkpoint is put around their forward here. Modules that checkpoint others by code of
    their own do not in evaluation mode: that costs memory, not exactness.
    """

    def around(layer: nn.Module, inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not (is_own() and torch.is_grad_enabled()):
                return inner(*args, **kwargs)
            return layer._gradient_checkpointing_func(partial(inner, **kwargs), *args)  # type: ignore[operator]

        return forward

    replaced = [layer for layer in layers if _checkpoints_itself(layer)]
    own = {id(layer): vars(layer).get("forward") for layer in replaced}
    try:
        for layer in replaced:
            layer.forward = around(layer, layer.forward)
        yield
    finally:
        for layer in replaced:
            former = own[id(layer)]
            if former is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = former


def _checkpoints_itself(layer: nn.Module) -> bool:
    return any(base.__name__ == "GradientCheckpointingLayer" for base in type(layer).__mro__)


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """One at a time on a model: other threads wait."""
    key = unwrapped(model)
    with _LOCKS_LOCK:
        lock = _LOCKS.setdefault(key, threading.RLock())
    with lock:
        yield


_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


@contextmanager
def eager() -> Iterator[None]:
    """No compiled code: it fuses layers away, and its backward passes run once only."""
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def frozen(model: nn.Module, but: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """No parameter requires grad, `but` for some: the backward pass computes no other weight gradient."""
    kept = {id(parameter) for parameter in but}
    trainable = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """No fused nn.TransformerEncoderLayer: in evaluation mode it computes with the base weights, past their LoRA.

    The flag is the process's: it comes back when the last of several threads leaves.
    """
    _FAST_PATH.enter()
    try:
        yield
    finally:
        _FAST_PATH.leave()


class PerThread(threading.local):
    """What each thread has of its own. A copy starts empty."""

    def __reduce__(self) -> tuple[type[PerThread], tuple[()]]:
        return type(self), ()


class _FastPath:
    """Counts who needs the fast path off."""

    def __init__(self) -> None:
        self._lock, self._users, self._was_enabled = threading.Lock(), 0, True

    def enter(self) -> None:
        with self._lock:
            if self._users == 0:
                self._was_enabled = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                torch.backends.mha.set_fastpath_enabled(self._was_enabled)


_FAST_PATH = _FastPath()
