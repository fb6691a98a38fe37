"""The ops on a GPU against fp64, by every backend."""

from __future__ import annotations

import pytest
import torch

import laplace_kernels as lk
from tests.kernels import inputs, oracles

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# fp32 accumulation in another order; 16-bit inputs may multiply fp32 intermediates as two bf16 parts each
TOLERANCE = {torch.bfloat16: 5e-5, torch.float16: 5e-5, torch.float32: 5e-6}
SIZES = [(0, 8), (1, 8), (1, 1), (70, 33), (1000, 136), (513, 1000), (4096, 520)]


def on_gpu(*tensors):
    return tuple(None if tensor is None else tensor.cuda() for tensor in tensors)


def gram_operands(T, d, dtype, masked, layout="contiguous"):
    generator = torch.Generator().manual_seed(T + 1000 * d)
    X = inputs.rows(T, d, dtype, layout, generator)
    mask = inputs.poisoned_mask(X, generator) if masked else None
    return X, mask, generator


def near(actual, exact, dtype):
    oracles.assert_near(actual.cpu(), exact, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("T", "d"), SIZES)
def test_gram(backend, T, d, masked, dtype):
    X, mask, _ = gram_operands(T, d, dtype, masked)
    x, keep = on_gpu(X, mask)
    C = lk.gram_(torch.ones(d, d, device="cuda"), x, keep, alpha=0.5)
    near(C.tril(), (1 + 0.5 * oracles.gram(X, mask)).tril(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("T", "d"), SIZES)
def test_gram_sketch(backend, T, d, masked, dtype):
    X, mask, generator = gram_operands(T, d, dtype, masked)
    Omega = torch.randn(d, 20, generator=generator)
    x, keep, omega = on_gpu(X, mask, Omega)
    Y = lk.gram_sketch_(torch.ones(d, 20, device="cuda"), x, omega, keep, alpha=0.5)
    near(Y, 1 + 0.5 * oracles.gram_sketch(X, Omega, mask), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("aligned", [False, True])
def test_gram_group(backend, aligned, dtype):
    sizes = [(0, 16), (1, 16), (700, 80), (33, 144)] if aligned else [(0, 3), (1, 7), (700, 33), (33, 130)]
    operands = [gram_operands(T, d, dtype, masked=T > 1) for T, d in sizes]
    alphas = [0.3 - i for i in range(len(sizes))]
    Cs = [torch.ones(d, d, device="cuda") for _, d in sizes]
    lk.gram_group_(Cs, [X.cuda() for X, *_ in operands], [on_gpu(mask)[0] for _, mask, _ in operands], alphas)
    for C, (X, mask, _), alpha in zip(Cs, operands, alphas, strict=True):
        near(C.tril(), (1 + alpha * oracles.gram(X, mask)).tril(), dtype)


def jacobian_operands(shared, N, C, T, r, d, k, dtype):
    generator = torch.Generator().manual_seed(T + d)
    Cs, Cl = (1 if shared == "small" else C), (1 if shared == "large" else C)
    small = torch.randn(N, Cs, T, r, generator=generator).to(dtype)
    large = torch.randn(N, T, Cl, d, generator=generator).to(dtype).transpose(1, 2)
    mask = torch.rand(N, T, generator=generator) < 0.6
    small.masked_fill_(~mask[:, None, :, None], torch.nan)
    large.masked_fill_(~mask[:, None, :, None], torch.inf)
    return small, large, torch.randn(d, k, generator=generator), mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", ["small", "large", "neither"])
@pytest.mark.parametrize(
    ("C", "T", "r", "d", "k"),
    [(1, 1, 4, 33, 3), (4, 100, 8, 520, 64), (5, 77, 64, 130, 128), (3, 0, 8, 8, 4)],
)
def test_jacobian_stats(backend, shared, C, T, r, d, k, dtype):
    arguments = jacobian_operands(shared, 3, C, T, r, d, k, dtype)
    P, D = lk.jacobian_stats(*on_gpu(*arguments))
    exact_P, exact_D = oracles.jacobian_stats(*arguments)
    near(P, exact_P, dtype)
    near(D, exact_D, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize(("T", "d", "n"), [(1, 8, 4), (100, 33, 3), (2048, 4096, 144)])
def test_project(T, d, n, precise, dtype):
    X, W = torch.randn(T, d).to(dtype), torch.randn(d, n) / d**0.5
    W = W if precise else W.to(dtype)
    Z = torch.full((T, n), torch.nan, device="cuda")
    near(lk.project_(Z, *on_gpu(X, W)), X.double() @ W.double(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize(("N", "T", "r", "d"), [(1, 1, 1, 1), (3, 77, 4, 33), (4, 512, 16, 4096)])
def test_jacobian(N, T, r, d, precise, dtype):
    small, large = torch.randn(N, T, r), torch.randn(N, T, d).to(dtype)
    small = small if precise else small.to(dtype)
    mask = torch.rand(N, T) < 0.6
    large[~mask] = torch.nan
    found = lk.jacobian(*on_gpu(small, large, mask))
    near(found, oracles.jacobians(small[:, None], large[:, None], mask)[:, 0], torch.float32)


def test_columns_of_a_wider_tensor_are_written_in_place():
    """As rows of a fit are: slices of one tensor, and thin strided operands."""
    X, W = torch.randn(2, 64, 256).bfloat16(), torch.randn(256, 24).bfloat16()
    Z = torch.full((2, 2, 64, 24), torch.nan, device="cuda")
    for slot in range(2):
        lk.project_(Z[slot].flatten(0, 1), *on_gpu(X.flatten(0, 1), W))
    exact = X.double() @ W.double()
    for slot in range(2):
        near(Z[slot], exact, torch.float32)
    rows = lk.jacobian(Z.flatten(0, 1)[..., :8], Z.flatten(0, 1)[..., 8:])
    near(rows[:2], exact[..., :8].mT @ exact[..., 8:], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("r", "d", "k"), [(1, 1, 1), (4, 33, 5), (8, 520, 64), (64, 40, 7), (16, 24, 24)])
def test_kron_apply(backend, r, d, k, dtype):
    generator = torch.Generator().manual_seed(r + d)
    W = torch.randn(3, r, d, generator=generator).to(dtype)
    U, V = inputs.orthogonal(d, k, generator).float(), inputs.orthogonal(r, r, generator).float()
    core, tail = torch.rand(r, k, generator=generator) + 0.1, torch.rand(r, generator=generator) + 0.1
    out = lk.kron_apply(*on_gpu(W, U, V, core, tail))
    near(out, oracles.kron_apply(W, U, V, core, tail), dtype)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_every_run_and_nothing_unwritten_is_read(backend, dtype):
    X, mask, _ = gram_operands(2000, 264, dtype, masked=True)
    x, keep = on_gpu(X, mask)
    omega = torch.ones(264, 20, device="cuda") / 16
    jacobian = on_gpu(*jacobian_operands("large", 3, 4, 100, 8, 520, 64, dtype))

    def run():
        C = lk.gram_(torch.zeros(264, 264, device="cuda"), x, keep)
        Y = lk.gram_sketch_(torch.zeros(264, 20, device="cuda"), x, omega, keep)
        return C.tril(), Y, *lk.jacobian_stats(*jacobian)

    for first, second in zip(run(), run(), strict=True):
        assert torch.isfinite(first).all()
        assert torch.equal(first, second)


def test_another_stream(backend):
    X, _, _ = gram_operands(1000, 136, torch.bfloat16, masked=False)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = X.cuda(non_blocking=True)
        torch.cuda._sleep(10_000_000)
        x = x * 2
        C = lk.gram_(torch.zeros(136, 136, device="cuda"), x)
    stream.synchronize()
    near(C.tril(), 4 * oracles.gram(X).tril(), torch.bfloat16)


@pytest.mark.parametrize("masked", [False, True])
def test_cuda_graph(backend, masked):
    X, mask, _ = gram_operands(1000, 136, torch.bfloat16, masked)
    x, keep = on_gpu(X, mask)
    C, Y, omega = torch.zeros(136, 136).cuda(), torch.zeros(136, 8).cuda(), torch.ones(136, 8).cuda()

    def update():
        lk.gram_(C, x, keep)
        lk.gram_sketch_(Y, x, omega, keep)

    update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    C.zero_()
    Y.zero_()
    for _ in range(3):
        graph.replay()
    near(C.tril(), 3 * oracles.gram(X, mask).tril(), torch.bfloat16)
    near(Y, 3 * oracles.gram_sketch(X, omega.cpu(), mask), torch.bfloat16)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_group_is_not_captured(backend):
    C, X = torch.zeros(16, 16, device="cuda"), torch.zeros(3, 16, device="cuda")
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        lk.gram_group_([C], [X])


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_rows_more_than_2_to_the_31_elements_apart(backend):
    X = torch.randn(3, 16).bfloat16()
    memory = torch.empty(2**31 + 16, dtype=torch.bfloat16, device="cuda")
    x = memory.as_strided((3, 16), (2**30, 1)).copy_(X)
    C = lk.gram_(torch.zeros(16, 16, device="cuda"), x)
    near(C.tril(), oracles.gram(X).tril(), torch.bfloat16)


def test_no_call_waits_for_the_device(backend):
    x, keep = on_gpu(*gram_operands(1000, 136, torch.bfloat16, masked=True)[:2])
    C, omega = torch.zeros(136, 136, device="cuda"), torch.ones(136, 8, device="cuda")
    jacobian = on_gpu(*jacobian_operands("large", 3, 4, 100, 8, 520, 64, torch.bfloat16))

    def run():
        lk.gram_(C, x, keep)
        lk.gram_group_([C], [x], [keep])
        lk.gram_sketch_(torch.empty_like(omega), x, omega, keep)
        lk.jacobian_stats(*jacobian)

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
