"""Hooks of others on backward passes are not called in passes of one's own.

They are for gradients of a loss; those here are of single outputs, and whoever keeps, clips or scales them would count
them in. Only the passes of `proofs.slopes` call them, once a model, to see whether they change a Jacobian, which is
refused. Hooks of autograd's nodes (`tensor.grad_fn.register_hook`) cannot be told apart from autograd's own.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

IsOwn = Callable[[], bool]

_REGISTER = Tensor.register_hook


def register_hook(tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> None:
    """One's own hook on a tensor's gradient.

    Modes of torch's functions, a default device say, would look up `Tensor.register_hook` anew.
    """
    with torch._C.DisableTorchFunction():
        _REGISTER(tensor, hook)


@contextmanager
def without_backward_hooks(model: nn.Module, is_own: IsOwn) -> Iterator[None]:
    """No hook on a module's, a parameter's or a tensor's gradients is called, where `is_own` at that moment.

    Tensors get theirs in the forward pass, which is when they are turned away.
    """
    hooked = [
        hooks
        for holder in (*model.modules(), *model.parameters())
        for hooks in (getattr(holder, name, None) for name in _DICTIONARIES)
        if hooks
    ]
    before = [dict(hooks) for hooks in hooked]
    _TENSOR_HOOKS.enter(is_own)
    try:
        for hooks in hooked:
            for key, hook in hooks.items():
                hooks[key] = _silent(hook, is_own)
        yield
    finally:
        _TENSOR_HOOKS.leave(is_own)
        for hooks, former in zip(hooked, before, strict=True):
            hooks.update({key: hook for key, hook in former.items() if key in hooks})


_DICTIONARIES = "_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks"


def _silent(hook: Callable[..., Any], is_own: IsOwn) -> Callable[..., Any]:
    return lambda *args: None if is_own() else hook(*args)


class _TensorHooks:
    """Turns away hooks that are put on tensors, for as long as someone asks for it."""

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), list[IsOwn]()
        self._former: Any = _REGISTER

    def enter(self, is_own: IsOwn) -> None:
        with self._lock:
            if not self._users:
                self._former = Tensor.register_hook
                Tensor.register_hook = self._patched()  # type: ignore[method-assign]
            self._users = [*self._users, is_own]

    def leave(self, is_own: IsOwn) -> None:
        with self._lock:
            self._users = [user for user in self._users if user is not is_own]
            if not self._users:
                Tensor.register_hook = self._former  # type: ignore[method-assign]

    def _patched(self) -> Callable[[Tensor, Callable[[Tensor], Tensor | None]], Any]:
        former = self._former

        def register(tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Any:
            if any(is_own() for is_own in self._users):
                return RemovableHandle(OrderedDict())  # of a hook that is never called
            return former(tensor, hook)

        return register


_TENSOR_HOOKS = _TensorHooks()
