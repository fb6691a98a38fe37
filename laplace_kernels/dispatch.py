"""The registers of ops and backends: which backend serves a call, and why.

A call outside `torch.compile` goes straight to the backend's function, which costs some microseconds. Under
`torch.compile` it becomes a node `torch.ops.laplace_kernels.<op>`, which makes the same choice when it runs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from laplace_kernels.op import Op
from laplace_kernels.overlap import refuse_overlap
from laplace_kernels.precision import FULL_PRECISION

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Backend:
    """One implementation of some ops.

    Attributes:
        name: What `use_backend` and LAPLACE_KERNELS_BACKEND call it.
        obstacle: (op, device, dtype) -> why this backend cannot serve the call, empty when it can. Asked about ops
            in `kernels` only.
        reservation: Why "auto" passes it over even where it can serve, empty when it does not.
        kernels: Op name -> function with the positional arguments of the op's schema.
    """

    name: str
    obstacle: Callable[[str, torch.device, torch.dtype], str]
    reservation: str = ""
    kernels: dict[str, Kernel] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """The backend that serves an op on a device for a dtype, the reason, and why each other one does not."""

    op: str
    device: torch.device
    dtype: torch.dtype
    backend: str
    reason: str
    others: Mapping[str, str]


_reference = Backend("reference", obstacle=lambda op, device, dtype: "")  # has every op, by its definition
_ops: dict[str, Op] = {}
_backends = {"reference": _reference}  # in order of preference, the reference last
_library = torch.library.Library("laplace_kernels", "DEF")  # the registrations live as long as this object
# A process-wide setting, not a context variable: backward hooks run in autograd's own threads on GPUs.
_requested = os.environ.get("LAPLACE_KERNELS_BACKEND") or "auto"
_chosen: dict[tuple[str, torch.device, torch.dtype], Kernel] = {}
_warned: set[tuple[str, str]] = set()

OPS: Mapping[str, Op] = MappingProxyType(_ops)


def register_op(op: Op) -> Op:
    """Make an op known: to `call`, to backends, and to torch as `torch.ops.laplace_kernels.<op>`.

    Args:
        op: The op; from now on `OPS[op.name]`.

    Returns:
        The op.

    Raises:
        ValueError: An op has this name already.
    """
    if op.name in _ops:
        raise ValueError(f"there is an op {op.name} already")

    def serve(*args: Any) -> Any:
        return _run(op, args)

    _library.define(op.schema, tags=(torch.Tag.pt2_compliant_tag, *op.tags))
    _library.impl(op.name, serve, "CompositeExplicitAutograd")
    torch.library.register_fake(f"laplace_kernels::{op.name}", op.fake, lib=_library)
    _reference.kernels[op.name] = op.reference
    _ops[op.name] = op
    return op


def register_backend(backend: Backend) -> None:
    """Make a backend available (or replace it), preferred to those registered before it."""
    global _backends
    others = {name: other for name, other in _backends.items() if name != backend.name}
    _backends = {backend.name: backend, **others}
    reconsider()


def register_kernel(backend: str, op: str, kernel: Kernel) -> None:
    """Let a backend serve one more op, or serve it by another kernel.

    Args:
        backend: One of `backends()`.
        op: One of `OPS`.
        kernel: Function with the positional arguments of the op's schema.

    Raises:
        ValueError: There is no such backend or op.
    """
    if backend not in _backends:
        raise ValueError(f"backend must be one of {', '.join(_backends)}, got {backend!r}")
    _check_op(op)
    _backends[backend].kernels[op] = kernel
    reconsider()


def reconsider() -> None:
    """Forget which backend serves what, for a backend whose obstacles have changed."""
    _chosen.clear()


def backends() -> tuple[str, ...]:
    """Names of the registered backends, the most preferred first."""
    return tuple(_backends)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Ask for one backend within a `with` block, in every thread of the process.

    A call it cannot serve (a CPU tensor for a GPU backend, say) falls back to the reference with one warning.
    The environment variable LAPLACE_KERNELS_BACKEND, read at import, does the same for a whole process.

    Args:
        name: One of `backends()`, or "auto" for the default choice.

    Raises:
        ValueError: `name` is not a registered backend.
    """
    global _requested
    _check_name(name, "use_backend")
    before = _requested
    _requested = name
    reconsider()
    try:
        yield
    finally:
        _requested = before
        reconsider()


def explain(op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Choice:
    """Which backend serves `op` on `device` for inputs in `dtype`, and why.

    Args:
        op: One of `OPS`.
        device: Device of the inputs.
        dtype: Dtype of the inputs (of X, `large` or W).

    Returns:
        The choice, with the reason why every other backend was passed over.

    Raises:
        ValueError: `op` is not an op, or LAPLACE_KERNELS_BACKEND names an unknown backend.
    """
    _check_op(op)
    _check_name(_requested, "LAPLACE_KERNELS_BACKEND")
    device = torch.device(device)
    verdicts = {name: _verdict(backend, op, device, dtype) for name, backend in _backends.items()}
    chosen = next((name for name, (serves, _) in verdicts.items() if serves), "reference")
    reason = verdicts[chosen][1]
    if _requested not in ("auto", chosen):
        reason = f"{_requested} was asked for, but {verdicts[_requested][1]}"
    others = {name: verdict for name, (_, verdict) in verdicts.items() if name != chosen}
    return Choice(op, device, dtype, chosen, reason, others)


def call(op: Op, *args: Any) -> Any:
    """Check the arguments of a registered op, in the order of its schema, and run it without autograd."""
    op.check(*args)
    if not torch.is_grad_enabled():
        return _served(op, args)
    with torch.no_grad():
        return _served(op, args)


def unchecked(op: Op, *args: Any) -> Any:
    """`call` for arguments that were made for it: what checks would take is the most of a small product's time.

    Not for use where autograd is on, nor under `torch.compile`.
    """
    with FULL_PRECISION:
        return _kernel(op.name, op.probed(args))(*args)


def _served(op: Op, args: tuple[Any, ...]) -> Any:
    if torch.compiler.is_compiling():
        return getattr(torch.ops.laplace_kernels, op.name)(*args)
    return _run(op, args)


def _run(op: Op, args: tuple[Any, ...]) -> Any:
    """Autocast and the precision that the caller allows products do not reach the op: its own is its contract."""
    if op.writes:
        refuse_overlap(op.tensors(args))
    with torch._C._DisableAutocast(), FULL_PRECISION:
        return _kernel(op.name, op.probed(args))(*args)


def _kernel(op: str, probe: Tensor) -> Kernel:
    key = (op, probe.device, probe.dtype)
    kernel = _chosen.get(key)
    if kernel is None:
        choice = explain(*key)
        if _requested not in ("auto", choice.backend) and (op, choice.reason) not in _warned:
            _warned.add((op, choice.reason))
            warnings.warn(f"laplace_kernels.{op} runs on {choice.backend}: {choice.reason}", stacklevel=6)
        kernel = _chosen[key] = _backends[choice.backend].kernels[op]
    return kernel


def _verdict(backend: Backend, op: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether `backend` serves under the present request, and why or why not."""
    obstacle = backend.obstacle(op, device, dtype) if op in backend.kernels else f"it has no {op}"
    if obstacle:
        return False, obstacle
    if _requested == "auto":
        return not backend.reservation, backend.reservation or "it is the first that can serve"
    if _requested == backend.name:
        return True, "it was asked for"
    return False, f"{_requested} was asked for"


def _check_op(op: str) -> None:
    if op not in _ops:
        raise ValueError(f"op must be one of {', '.join(_ops)}, got {op!r}")


def _check_name(name: str, where: str) -> None:
    if name != "auto" and name not in _backends:
        raise ValueError(f"{where} must be auto or one of {', '.join(_backends)}, got {name!r}")
