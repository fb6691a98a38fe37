"""The ops and their baselines, over d and T."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import laplace_kernels as lk
from bench.gpu.timing import Call, Variant, inputs_beyond_cache, measure

EXAMPLES, CLASSES, RANK, BASIS, SAMPLES, GROUP = 8, 4, 8, 64, 16, 32
SKETCH = 128  # columns of a sketch in a fit, as it is by default
Case = tuple[str, int, int]  # op and variation, d, T


@dataclass(frozen=True)
class Problem:
    """One op at one size.

    Attributes:
        flops: Of the operation itself, whatever a variant executes.
        nbytes: That must be read and written at least.
        operands: Makes one set of inputs.
        baseline: What a user would write with the library's products.
        run: The op on one set of inputs; None for a ceiling, which has a baseline only.
        others: More that a user might write.
        capture: Whether the op may be captured in a CUDA graph.
    """

    flops: float
    nbytes: float
    operands: Callable[[], tuple[Any, ...]]
    baseline: Callable[..., object]
    run: Callable[..., object] | None = None
    others: Mapping[str, Callable[..., object]] = field(default_factory=dict)
    capture: bool = True


def cases(widths: tuple[int, ...], tokens: tuple[int, ...]) -> list[Case]:
    """What the machine reaches at most, then every op over all sizes; variations of lesser weight at one T only.

    In the order of how much a fit depends on them.
    """
    ceilings = [(name, widths[-1], tokens[-1]) for name in ("bf16 product", "copy")]
    everywhere = ("project_", "gram_", "gram_ masked", "gram_sketch_", "jacobian")
    found = [(op, d, T) for op in everywhere for d in widths for T in tokens]
    found += [("gram_group_", widths[0] // 4, T) for T in tokens]
    found += [("kron_apply", d, 0) for d in widths]
    extra = ("gram_sketch_ of 64 columns", "jacobian_stats", "jacobian_stats of 4 classes")
    return ceilings + found + [(op, d, tokens[-1]) for op in extra for d in widths]


def describe(case: Case) -> dict[str, Any]:
    """What names a case in the report."""
    return dict(zip(("op", "d", "T"), case, strict=True))


def measure_op(case: Case, device: str, rounds: int, refused: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """One record: times of the baseline and of each backend that serves the case, and what failed.

    Args:
        case: the op and its sizes.
        device: where it runs.
        rounds: timings of each variant.
        refused: backends that are not to be measured, and why.
    """
    problem = make_problem(case, torch.device(device))
    sets = [problem.operands() for _ in range(inputs_beyond_cache(int(problem.nbytes), torch.device(device)))]
    written = {"baseline": problem.baseline, **problem.others}
    variants = {name: Variant([_bind(call, operands) for operands in sets]) for name, call in written.items()}
    unavailable = {}
    for backend in lk.backends() if problem.run else ():
        with lk.use_backend(backend):
            choice = lk.explain(case[0].split()[0], device, torch.bfloat16)
        if backend in refused or choice.backend != backend:
            unavailable[backend] = refused.get(backend, choice.reason)
        else:
            calls = [_bind(problem.run, operands) for operands in sets]
            variants[backend] = Variant(calls, partial(lk.use_backend, backend))
    times, failed = measure(variants, torch.device(device), rounds, problem.capture)
    yield {
        **describe(case),
        "gflop": problem.flops / 1e9,
        "executed_gflop": _executed_gflop(case, torch.device(device)) if "triton" in times else None,
        "megabytes": problem.nbytes / 1e6,
        "microseconds": {name: asdict(spread) for name, spread in times.items()},
        "unavailable": unavailable,
        "failed": failed,
    }


def make_problem(case: Case, device: torch.device) -> Problem:
    """The op at its sizes, by its name."""
    op, d, T = case
    name, _, variation = op.partition(" ")
    if name == "gram_":
        return _gram(d, T, device, masked=variation == "masked")
    if name == "gram_sketch_":
        return _gram_sketch(d, T, 64 if variation else SKETCH, device)
    if name == "jacobian_stats":
        classes = CLASSES if variation == "of 4 classes" else 1
        return _jacobian_stats(d, T, classes, device)
    makers = {"kron_apply": _kron_apply, "gram_group_": _gram_group, "bf16": _product, "copy": _copy}
    makers |= {"project_": _project, "jacobian": _jacobian}
    return makers[name](d, T, device)


def _executed_gflop(case: Case, device: torch.device) -> float | None:
    """What the Triton kernel of `gram_` executes, which skips the tiles above the diagonal; None for other ops."""
    from laplace_kernels.triton import gram, launch, triangle

    op, d, T = case
    if op not in ("gram_", "gram_ masked"):
        return None
    arch = launch.architecture(device)
    through_tma = op == "gram_" and arch in gram.TMA_TILES
    tiles = (
        gram.TMA_TILES[arch] if through_tma else triangle.pointer_tiles(arch, torch.bfloat16, aligned=True)
    )
    tile, _ = gram.schedule(tiles, d, T, launch.multiprocessors(device), max(1, T // 512))
    return 2e-9 * T * triangle.lower_tiles(d, tile) * tile.rows * tile.columns


def _bind(function: Callable[..., object], operands: tuple[Any, ...]) -> Call:
    return lambda: function(*operands)


def _random(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """A product of bf16 matrices with a fp32 result, where the library has one."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _gram(d: int, T: int, device: torch.device, masked: bool) -> Problem:
    def operands() -> tuple[Any, ...]:
        keep = torch.rand(T, device=device) < 0.8 if masked else None
        return torch.zeros(d, d, device=device), _random(T, d, device=device), keep

    def baseline(C: Tensor, X: Tensor, keep: Tensor | None) -> None:
        X = X if keep is None else torch.where(keep[:, None], X, 0)
        C.add_(_mm(X.mT, X))

    def in_place(C: Tensor, X: Tensor, keep: Tensor | None) -> None:
        X = X if keep is None else torch.where(keep[:, None], X, 0)
        if X.is_cuda:
            torch.addmm(C, X.mT, X, out_dtype=torch.float32, out=C)
        else:
            C.addmm_(X.float().mT, X.float())

    others = {"addmm": in_place}
    return Problem(2.0 * T * d * d, 2.0 * T * d + 4.0 * d * d, operands, baseline, lk.gram_, others)


def _gram_group(d: int, T: int, device: torch.device) -> Problem:
    def operands() -> tuple[Any, ...]:
        Cs = [torch.zeros(d, d, device=device) for _ in range(GROUP)]
        return Cs, [_random(T, d, device=device) for _ in range(GROUP)]

    def baseline(Cs: list[Tensor], Xs: list[Tensor]) -> None:
        for C, X in zip(Cs, Xs, strict=True):
            C.add_(_mm(X.mT, X))

    nbytes = GROUP * (2.0 * T * d + 4.0 * d * d)
    flops = GROUP * 2.0 * T * d * d
    return Problem(flops, nbytes, operands, baseline, lk.gram_group_, capture=False)


def _gram_sketch(d: int, T: int, m: int, device: torch.device) -> Problem:
    def operands() -> tuple[Any, ...]:
        omega = _random(d, m, device=device, dtype=torch.float32) / d**0.5
        return torch.zeros(d, m, device=device), _random(T, d, device=device), omega

    def baseline(Y: Tensor, X: Tensor, omega: Tensor) -> None:
        Y.add_(_mm(X.mT, _mm(X, omega.bfloat16()).bfloat16()))

    return Problem(4.0 * T * d * m, 2.0 * T * d, operands, baseline, lk.gram_sketch_)


def _project(d: int, T: int, device: torch.device) -> Problem:
    """What a fit of rows asks of an output gradient: 16 columns of maps and a sketch's."""
    n = 2 * RANK + SKETCH

    def operands() -> tuple[Any, ...]:
        return torch.empty(T, n, device=device), _random(T, d, device=device), _random(n, d, device=device).mT

    def baseline(Z: Tensor, X: Tensor, W: Tensor) -> Tensor:
        return _mm(X, W)

    return Problem(2.0 * T * d * n, 2.0 * T * d + 2.0 * d * n + 4.0 * T * n, operands, baseline, lk.project_)


def _jacobian(d: int, T: int, device: torch.device) -> Problem:
    tokens = max(1, T // EXAMPLES)

    def operands() -> tuple[Any, ...]:
        small = _random(EXAMPLES, tokens, RANK, device=device, dtype=torch.float32)
        return small, _random(EXAMPLES, tokens, d, device=device)

    def baseline(small: Tensor, large: Tensor) -> Tensor:
        return _bmm(small.mT, large)

    return Problem(2.0 * T * d * RANK, 2.0 * T * d, operands, baseline, lk.jacobian)


def _bmm(small: Tensor, large: Tensor) -> Tensor:
    """A fp32 matrix times a bf16 one: two halves, with a fp32 result, where the library has one."""
    if not large.is_cuda:
        return torch.bmm(small, large.float())
    high = small.to(large.dtype)
    both = torch.bmm(torch.cat([high, (small - high).to(large.dtype)], 1), large, out_dtype=torch.float32)
    return both[:, : small.shape[1]] + both[:, small.shape[1] :]


def _jacobian_stats(d: int, T: int, classes: int, device: torch.device) -> Problem:
    """A prediction asks for it one contrast at a time, with the small side in fp32."""
    tokens = T // EXAMPLES

    def operands() -> tuple[Any, ...]:
        small = _random(EXAMPLES, classes, tokens, RANK, device=device, dtype=torch.float32)
        basis = _random(d, BASIS, device=device, dtype=torch.float32) / d**0.5
        return small, _random(EXAMPLES, 1, tokens, d, device=device), basis

    def baseline(small: Tensor, large: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        stacked = small.mT.reshape(EXAMPLES, classes * RANK, tokens)
        jacobian = _bmm(stacked, large[:, 0]).view(EXAMPLES, classes, RANK, d)
        return jacobian @ basis, torch.einsum("ncji,neji->njce", jacobian, jacobian)

    flops = 2.0 * EXAMPLES * classes * RANK * d * (tokens + BASIS + classes)
    return Problem(flops, 2.0 * T * d, operands, baseline, lk.jacobian_stats)


def _kron_apply(d: int, T: int, device: torch.device) -> Problem:
    def operands() -> tuple[Any, ...]:
        shapes = ((SAMPLES, RANK, d), (d, BASIS), (RANK, RANK), (RANK, BASIS), (RANK,))
        return tuple(_random(*shape, device=device, dtype=torch.float32) for shape in shapes)

    def baseline(W: Tensor, U: Tensor, V: Tensor, core: Tensor, tail: Tensor) -> Tensor:
        rotated = V.mT @ W
        projected = rotated @ U
        return V @ ((core * projected) @ U.mT + tail[:, None] * (rotated - projected @ U.mT))

    flops = 4.0 * SAMPLES * RANK * d * (BASIS + RANK)
    return Problem(flops, 8.0 * SAMPLES * RANK * d, operands, baseline, lk.kron_apply)


def _product(d: int, T: int, device: torch.device) -> Problem:
    def operands() -> tuple[Any, ...]:
        return _random(T, d, device=device), _random(d, d, device=device)

    return Problem(2.0 * T * d * d, 4.0 * T * d + 2.0 * d * d, operands, torch.matmul)


def _copy(d: int, T: int, device: torch.device) -> Problem:
    def operands() -> tuple[Any, ...]:
        source = _random(T, d, device=device)
        return torch.empty_like(source), source

    return Problem(0.0, 4.0 * T * d, operands, Tensor.copy_)
