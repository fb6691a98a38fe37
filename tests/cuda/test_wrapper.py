"""laplace_kernels.cuda from the public ops down to the kernels, the compiled library replaced by the emulated GPU."""

from __future__ import annotations

import contextlib
import ctypes
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import laplace_kernels as lk
from laplace_kernels import cuda
from tests.cuda import emulation
from tests.kernels import inputs, oracles

pytestmark = emulation.needs_host_compiler
dtypes = st.sampled_from([torch.bfloat16, torch.float16])
PROCESSORS = 4
BF16_PARTS = 2e-5  # relative to sums without cancellation


class EmulatedLibrary:
    """`laplace_kernels._cuda` on the emulated GPU, which reads CPU tensors."""

    def refusal(self) -> str:
        return ""

    def workspace_floats(self, sketches: bytes, fp16: bool, deterministic: bool) -> int:
        plans = [emulation.plan_tiles(sketch, PROCESSORS, deterministic) for sketch in served(sketches)]
        return max((emulation.workspace_floats(plan) for plan in plans), default=0)

    def flush(self, grams, sketches, fp16, workspace, deterministic, stream):
        members = unpacked(emulation.Gram, grams)
        error = emulation.library().emulate_gram_group(
            members, ctypes.c_int64(len(members)), fp16, PROCESSORS, not deterministic, ctypes.c_uint64(0),
            ctypes.byref(ctypes.c_int()),
        )  # fmt: skip
        assert error is None, error
        for sketch in served(sketches):
            plan = emulation.plan_tiles(sketch, PROCESSORS, deterministic)
            emulation.run_tiles(sketch, plan, fp16, workspace)


def served(sketches):
    """The sketches that are not empty, as csrc/launch.cu has it."""
    return [s for s in unpacked(emulation.Sketch, sketches) if s.tokens and s.d and s.m]


def unpacked(struct, data):
    assert len(data) % ctypes.sizeof(struct) == 0
    return (struct * (len(data) // ctypes.sizeof(struct))).from_buffer_copy(data)


@contextlib.contextmanager
def emulated():
    with pytest.MonkeyPatch.context() as patch:
        library = EmulatedLibrary()
        patch.setattr(cuda, "_library", lambda: library)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
        patch.setattr(cuda, "_needs_gpu", lambda device: "")
        with lk.use_backend("cuda"), warnings.catch_warnings():
            warnings.simplefilter("error")
            yield


def kept_bound(X, Omega, mask):
    kept = oracles.kept(X, mask).abs()
    return 1 + kept.T @ (kept @ Omega.double().abs())


@settings(max_examples=25, deadline=None)
@given(
    inputs.token_counts, inputs.sizes, st.integers(0, 9), dtypes, inputs.layouts, st.booleans(), inputs.seeds
)
def test_gram_sketch_of_any_layout(T, d, m, dtype, layout, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    X = inputs.rows(T, d, dtype, layout, generator)
    mask = inputs.poisoned_mask(X, generator) if masked else None
    for Omega in (
        torch.randn(d, m, generator=generator),
        torch.randn(m, d, generator=generator).T,
        torch.randn(d, m, generator=generator).bfloat16(),
    ):
        Y = torch.ones(d, m)
        with emulated():
            assert lk.explain("gram_sketch_", "cpu", dtype).backend == "cuda"
            lk.gram_sketch_(Y, X, Omega, mask, alpha=0.5)
        error = (Y - 1 - 0.5 * oracles.gram_sketch(X, Omega, mask)).abs()
        assert (error <= BF16_PARTS * kept_bound(X, Omega, mask)).all()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(inputs.token_counts, inputs.sizes, inputs.layouts), max_size=4), dtypes, inputs.seeds
)
def test_gram_group_of_any_layout(shapes, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    Xs = [inputs.rows(T, d, dtype, layout, generator) for T, d, layout in shapes]
    masks = [inputs.poisoned_mask(X, generator) if i % 2 else None for i, X in enumerate(Xs)]
    Cs = [torch.ones(X.shape[1], X.shape[1]) for X in Xs]
    with emulated():
        lk.gram_group_(Cs, Xs, masks, [0.5] * len(Xs))
    for C, X, mask in zip(Cs, Xs, masks, strict=True):
        oracles.assert_near(C.tril(), (1 + 0.5 * oracles.gram(X, mask)).tril())


@pytest.mark.parametrize("deterministic", [False, True])
def test_flush_issues_everything_at_once(deterministic):
    Xs = [torch.randn(30, d).bfloat16() for d in (5, 64, 70)]
    mask = torch.arange(30) % 2 == 0
    Omegas = [torch.randn(X.shape[1], 6) for X in Xs]
    grams = [cuda.Gram(torch.zeros(X.shape[1], X.shape[1]), X) for X in Xs]
    sketches = [cuda.Sketch(torch.zeros(len(W), 6), X, W, mask, 2.0) for X, W in zip(Xs, Omegas, strict=True)]
    torch.use_deterministic_algorithms(deterministic)
    try:
        with emulated():
            cuda.flush(grams, sketches)
            cuda.flush()
    finally:
        torch.use_deterministic_algorithms(False)
    for gram, sketch in zip(grams, sketches, strict=True):
        oracles.assert_near(gram.C.tril(), oracles.gram(gram.X).tril())
        oracles.assert_near(sketch.Y, 2 * oracles.gram_sketch(sketch.X, sketch.Omega, mask), 1e-4)


@pytest.mark.parametrize(
    ("update", "kind", "message"),
    [
        (cuda.Gram(torch.zeros(3, 3), torch.zeros(2, 3)), TypeError, r"grams\[1\]: X must be bfloat16 or float16"),
        (cuda.Gram(torch.zeros(3, 4), torch.zeros(2, 3).half()), ValueError, r"grams\[1\]: C must have shape"),
        (cuda.Gram(torch.zeros(3, 3).T[:, ::2], torch.zeros(2, 3).half()), ValueError, r"grams\[1\]: C must"),
        (cuda.Gram(torch.zeros(2, 2), torch.zeros(2, 2).half()), ValueError, r"dtype and device of grams\[0\]"),
        (cuda.Sketch(torch.zeros(2, 2), torch.zeros(2, 3).half(), torch.zeros(3, 2)), ValueError, r"sketches\[0\]: Y"),
        (
            cuda.Sketch(torch.zeros(3, 2), torch.zeros(2, 3).bfloat16(), torch.zeros(3, 2), torch.ones(2)),
            TypeError,
            r"sketches\[0\]: mask must be a bool tensor",
        ),
    ],
)  # fmt: skip
def test_wrong_updates_are_named(update, kind, message):
    good = cuda.Gram(torch.zeros(2, 2), torch.zeros(3, 2).bfloat16())
    grams = [good, update] if isinstance(update, cuda.Gram) else [good]
    sketches = [] if isinstance(update, cuda.Gram) else [update]
    with emulated(), pytest.raises(kind, match=message):
        cuda.flush(grams, sketches)
    assert not good.C.any()


def test_updates_do_not_share_an_accumulator():
    C, Y = torch.zeros(2, 2), torch.zeros(3, 2)
    X, wide = torch.zeros(3, 2).bfloat16(), torch.zeros(3, 3).bfloat16()
    with (
        emulated(),
        pytest.raises(ValueError, match=r"^grams\[0\]: C must not share memory with grams\[1\]: C$"),
    ):
        cuda.flush([cuda.Gram(C, X), cuda.Gram(C, X)])
    with (
        emulated(),
        pytest.raises(ValueError, match=r"^sketches\[0\]: Y must not share memory with .*: Omega$"),
    ):
        cuda.flush(
            sketches=[cuda.Sketch(Y, wide, torch.zeros(3, 2)), cuda.Sketch(torch.zeros(3, 2), wide, Y)]
        )


def test_cpu_tensors_are_refused():
    with pytest.raises(RuntimeError, match="the CUDA kernels cannot serve X on cpu: "):
        cuda.flush([cuda.Gram(torch.zeros(2, 2), torch.zeros(3, 2).bfloat16())])


def test_it_serves_only_when_asked_for():
    X = torch.randn(4, 2).bfloat16()
    with emulated():
        assert lk.explain("gram_sketch_", "cpu", X.dtype).backend == "cuda"
        with lk.use_backend("auto"):
            assert lk.explain("gram_sketch_", "cpu", X.dtype).backend == "reference"
        choice = lk.explain("gram_sketch_", "cpu", torch.float32)
        assert choice.reason == "cuda was asked for, but it reads bfloat16 and float16, not float32"
        assert lk.explain("kron_apply").reason == "cuda was asked for, but it has no kron_apply"


def test_structs_are_those_of_the_kernels():
    assert cuda._GRAM.size == ctypes.sizeof(emulation.Gram)
    assert cuda._SKETCH.size == ctypes.sizeof(emulation.Sketch)
