"""Which backend serves a call, and why; registration of the ops with torch.

A call outside `torch.compile` goes straight to the backend's function, which costs a few microseconds. Under
`torch.compile` it becomes a node `torch.ops.laplace_kernels.<op>`, which makes the same choice when it runs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_kernels import reference
from laplace_kernels.checks import accumulation_dtype

Kernel = Callable[..., Any]

SCHEMAS = {
    "gram_": "(Tensor(a!) C, Tensor X, Tensor? mask, float alpha) -> ()",
    "gram_sketch_": "(Tensor(a!) Y, Tensor X, Tensor Omega, Tensor? mask, float alpha) -> ()",
    "gram_group_": "(Tensor(a!)[] Cs, Tensor[] Xs, Tensor?[] masks, float[] alphas) -> ()",
    "jacobian_stats": (
        "(Tensor small, Tensor large, Tensor basis, Tensor? mask, bool row_grams) -> (Tensor, Tensor)"
    ),
    "kron_apply": "(Tensor W, Tensor U, Tensor V, Tensor core, Tensor tail) -> Tensor",
}
OPS = tuple(SCHEMAS)


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Attributes:
        name: What `use_backend` and LAPLACE_KERNELS_BACKEND call it.
        kernels: Op name -> function with the positional arguments of the op's schema.
        obstacle: (op, device, dtype) -> why this backend cannot serve the call, empty when it can.
        reservation: Why "auto" passes it over even where it can serve, empty when it does not.
    """

    name: str
    kernels: Mapping[str, Kernel]
    obstacle: Callable[[str, torch.device, torch.dtype], str]
    reservation: str = ""


@dataclass(frozen=True)
class Choice:
    """The backend that serves an op on a device for a dtype, the reason, and why each other one does not."""

    op: str
    device: torch.device
    dtype: torch.dtype
    backend: str
    reason: str
    others: Mapping[str, str]


_backends: dict[str, Backend] = {}  # in order of preference, the reference last
# A process-wide setting, not a context variable: backward hooks run in autograd's own threads on GPUs.
_requested = os.environ.get("LAPLACE_KERNELS_BACKEND") or "auto"
_chosen: dict[tuple[str, torch.device, torch.dtype], Kernel] = {}
_warned: set[tuple[str, str]] = set()


def register_backend(backend: Backend) -> None:
    """Make a backend available (or replace it), preferred to those registered before it."""
    global _backends
    others = {name: other for name, other in _backends.items() if name != backend.name}
    _backends = {backend.name: backend, **others}
    _chosen.clear()


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
    _chosen.clear()
    try:
        yield
    finally:
        _requested = before
        _chosen.clear()


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
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    _check_name(_requested, "LAPLACE_KERNELS_BACKEND")
    device = torch.device(device)
    verdicts = {name: _verdict(backend, op, device, dtype) for name, backend in _backends.items()}
    chosen = next((name for name, (serves, _) in verdicts.items() if serves), "reference")
    reason = verdicts[chosen][1]
    if _requested not in ("auto", chosen):
        reason = f"{_requested} was asked for, but {verdicts[_requested][1]}"
    others = {name: verdict for name, (_, verdict) in verdicts.items() if name != chosen}
    return Choice(op, device, dtype, chosen, reason, others)


def call(op: str, probe: Tensor, *args: Any) -> Any:
    """Run `op` on checked arguments; the device and dtype of `probe` decide who serves it.

    The caller's autocast does not reach the op: its precision is its contract.
    """
    with torch.no_grad():
        if torch.compiler.is_compiling():
            return getattr(torch.ops.laplace_kernels, op)(*args)
        if torch.is_autocast_enabled(probe.device.type):
            with torch.autocast(probe.device.type, enabled=False):
                return _kernel(op, probe)(*args)
        return _kernel(op, probe)(*args)


def _kernel(op: str, probe: Tensor) -> Kernel:
    key = (op, probe.device, probe.dtype)
    kernel = _chosen.get(key)
    if kernel is None:
        choice = explain(*key)
        if _requested not in ("auto", choice.backend) and (op, choice.reason) not in _warned:
            _warned.add((op, choice.reason))
            warnings.warn(f"laplace_kernels.{op} runs on {choice.backend}: {choice.reason}", stacklevel=4)
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


def _check_name(name: str, where: str) -> None:
    if name != "auto" and name not in _backends:
        raise ValueError(f"{where} must be auto or one of {', '.join(_backends)}, got {name!r}")


def _fake_nothing(*args: Any) -> None:
    return None


def _fake_jacobian_stats(
    small: Tensor, large: Tensor, basis: Tensor, mask: Tensor | None, row_grams: bool
) -> tuple[Tensor, Tensor]:
    N, Cs, _, r = small.shape
    C = max(Cs, large.shape[1])
    dtype = accumulation_dtype(large.dtype)
    P = large.new_empty((N, C, r, basis.shape[1]), dtype=dtype)
    return P, large.new_empty((N, r, C, C) if row_grams else (0,), dtype=dtype)


def _fake_kron_apply(W: Tensor, U: Tensor, V: Tensor, core: Tensor, tail: Tensor) -> Tensor:
    return W.new_empty(W.shape, dtype=accumulation_dtype(W.dtype))


_PROBES: dict[str, Callable[..., Tensor]] = {
    "gram_": lambda C, X, *_: X,
    "gram_sketch_": lambda Y, X, *_: X,
    "gram_group_": lambda Cs, Xs, *_: Xs[0],
    "jacobian_stats": lambda small, large, *_: large,
    "kron_apply": lambda W, *_: W,
}
_FAKES: dict[str, Kernel] = {"jacobian_stats": _fake_jacobian_stats, "kron_apply": _fake_kron_apply}


def _register_ops() -> torch.library.Library:
    library = torch.library.Library("laplace_kernels", "DEF")
    for op, schema in SCHEMAS.items():

        def serve(*args: Any, op: str = op) -> Any:
            return _kernel(op, _PROBES[op](*args))(*args)

        unsafe = (torch.Tag.cudagraph_unsafe,) if op == "gram_group_" else ()
        library.define(op + schema, tags=(torch.Tag.pt2_compliant_tag, *unsafe))
        library.impl(op, serve, "CompositeExplicitAutograd")
        torch.library.register_fake(f"laplace_kernels::{op}", _FAKES.get(op, _fake_nothing), lib=library)
    return library


register_backend(
    Backend(
        name="reference",
        kernels={op: getattr(reference, op) for op in OPS},
        obstacle=lambda op, device, dtype: "",
    )
)
_LIBRARY = _register_ops()  # the registrations live as long as this object
