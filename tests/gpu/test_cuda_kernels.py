"""The CUDA backend on a GPU, against fp64. Skipped where there is none: the kernels have never run on hardware.

LAPLACE_KERNELS_SANITIZER=memcheck (or racecheck, synccheck, initcheck) also runs them under compute-sanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

import laplace_kernels as lk
from laplace_kernels import cuda
from tests.kernels import inputs, oracles

SANITIZER = os.environ.get("LAPLACE_KERNELS_SANITIZER", "")
DTYPES = [torch.bfloat16, torch.float16]
# Of the sum of magnitudes. Omega and Z are used to 16 bits; tensor cores truncate what they add, once per 16 products.
TOLERANCE = 1e-4

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def missing(reason):
    """Skips where the library was not asked for; where it was, a run without it would prove nothing."""
    if os.environ.get("LAPLACE_KERNELS_BUILD_CUDA") == "1":
        pytest.fail(f"{reason}; LAPLACE_KERNELS_BUILD_CUDA=1 python setup.py build_ext --inplace builds it")
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def _served_by_cuda():
    choice = lk.explain("gram_sketch_", "cuda", torch.bfloat16)
    if choice.others.get("cuda", "").startswith("laplace_kernels._cuda is not there"):
        missing(choice.others["cuda"])
    with lk.use_backend("cuda"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="laplace_kernels")  # a silent fallback would prove nothing
        assert lk.explain("gram_sketch_", "cuda", torch.bfloat16).backend == "cuda"
        yield


def rows(T, d, dtype, masked, generator):
    """[T, d] and its mask on the GPU, with NaN in the masked rows."""
    X = torch.randn(T, d, generator=generator).to(dtype)
    mask = inputs.poisoned_mask(X, generator) if masked else None
    return X.cuda(), None if mask is None else mask.cuda()


def check_sketch(Y, X, Omega, mask, alpha=1.0):
    kept = oracles.kept(X, mask).abs()
    exact = 1 + alpha * oracles.gram_sketch(X, Omega, mask)
    assert ((Y - exact).abs() <= TOLERANCE * (1 + kept.T @ (kept @ Omega.double().abs()))).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "d", "m"),
    [
        (0, 64, 8), (1, 1, 1), (1, 4096, 64), (63, 33, 5), (64, 64, 64), (65, 65, 65), (1000, 768, 128),
        (2049, 4096, 64), (4099, 4090, 100), (2050, 8192, 64), (700, 11008, 64), (130, 9000, 20), (300, 128, 200),
        (9999, 576, 48),
    ],
)  # fmt: skip
def test_gram_sketch(T, d, m, dtype, masked):
    generator = torch.Generator().manual_seed(T + d + m)
    X, mask = rows(T, d, dtype, masked, generator)
    Omega = torch.randn(d, m, generator=generator).cuda()
    Y = torch.ones(d, m, device="cuda")
    lk.gram_sketch_(Y, X, Omega, mask, alpha=-0.5)
    check_sketch(Y, X, Omega, mask, -0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-5, 1e3])
def test_gram_sketch_of_large_and_small_numbers(dtype, scale):
    generator = torch.Generator().manual_seed(0)
    X = (torch.randn(700, 768, generator=generator) * scale).to(dtype).cuda()
    X[500:] *= 5
    Omega = (torch.randn(768, 32, generator=generator) * torch.logspace(-9, 4, 32)).cuda()
    Y = lk.gram_sketch_(torch.zeros(768, 32, device="cuda"), X, Omega)
    exact = oracles.gram_sketch(X, Omega)
    assert ((Y - exact).abs().amax(0) <= TOLERANCE * exact.abs().amax(0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["padded rows", "every second row", "transposed"])
def test_gram_sketch_of_other_layouts(dtype, layout):
    generator = torch.Generator().manual_seed(0)
    X = inputs.rows(300, 130, dtype, layout, generator).cuda()
    Omega = torch.randn(20, 130, generator=generator).cuda().T
    Y = torch.ones(130, 20, device="cuda")
    lk.gram_sketch_(Y, X, Omega)
    check_sketch(Y, X, Omega, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_group(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(0, 8), (1, 1), (5000, 8), (333, 16), (64, 64), (1000, 65), (777, 300), (2048, 576)] * 70
    data = [rows(T, d, dtype, i % 3 == 0, generator) for i, (T, d) in enumerate(shapes)]
    Xs, masks = [X for X, _ in data], [mask for _, mask in data]
    Cs = [torch.ones(d, d, device="cuda") for _, d in shapes]
    lk.gram_group_(Cs, Xs, masks, [2.0] * len(Cs))
    for C, X, mask in zip(Cs, Xs, masks, strict=True):
        oracles.assert_near(C.tril(), (1 + 2 * oracles.gram(X, mask)).tril(), TOLERANCE)
        assert (C.triu(1) == torch.ones_like(C).triu(1)).all()


def test_a_flush_on_another_stream_waits_for_its_inputs():
    stream = torch.cuda.Stream()
    X = torch.zeros(4096, 768, dtype=torch.bfloat16, device="cuda")
    source, Omega = torch.randn_like(X), torch.randn(768, 64, device="cuda")
    C, Y = torch.ones(768, 768, device="cuda"), torch.ones(768, 64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # clock cycles before X gets its values
        X.copy_(source)
        cuda.flush([cuda.Gram(C, X)], [cuda.Sketch(Y, X, Omega)])
    stream.synchronize()
    oracles.assert_near(C.tril(), (1 + oracles.gram(X)).tril(), TOLERANCE)
    check_sketch(Y, X, Omega, None)


@pytest.mark.parametrize(("d", "m"), [(64, 64), (768, 64), (4096, 64), (2048, 128)])
def test_clusters_serve_on_hopper(d, m):
    """Or the other tests are of the portable kernels only. Every Hopper can form clusters of 8."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("there are no clusters")
    for fp16 in (False, True):
        ranks, clusters = cuda._library().cluster(d, m, fp16)
        processors = torch.cuda.get_device_properties().multi_processor_count
        assert ranks * clusters > processors // 2, (ranks, clusters)


# a cluster on Hopper; the portable kernels, with parts of the tokens; with parts of d
@pytest.mark.parametrize(("T", "d"), [(20_000, 768), (20_000, 801), (300, 9000)])
def test_deterministic_results_are_the_same_bits(T, d):
    generator = torch.Generator().manual_seed(0)
    X, mask = rows(T, d, torch.bfloat16, True, generator)
    Omega = torch.randn(d, 64, generator=generator).cuda()
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(5):
            C, Y = torch.zeros(d, d, device="cuda"), torch.zeros(d, 64, device="cuda")
            cuda.flush([cuda.Gram(C, X, mask)], [cuda.Sketch(Y, X, Omega, mask)])
            results.append((C.tril(), Y))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(C, results[0][0]) and torch.equal(Y, results[0][1]) for C, Y in results)


def test_nothing_waits_for_the_device_and_a_graph_captures_it():
    X, Omega = torch.randn(500, 256, device="cuda").bfloat16(), torch.randn(256, 32, device="cuda")
    C, Y = torch.zeros(256, 256, device="cuda"), torch.zeros(256, 32, device="cuda")
    cuda.flush([cuda.Gram(C, X)], [cuda.Sketch(Y, X, Omega)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.flush([cuda.Gram(C, X)], [cuda.Sketch(Y, X, Omega)])
    C.fill_(1.0)
    Y.fill_(1.0)
    graph.replay()
    torch.cuda.synchronize()
    oracles.assert_near(C.tril(), (1 + oracles.gram(X)).tril(), TOLERANCE)
    check_sketch(Y, X, Omega, None)


@pytest.mark.skipif(not SANITIZER, reason="LAPLACE_KERNELS_SANITIZER is not set")
def test_compute_sanitizer():
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    chosen = "test_gram_sketch and not 4096 and not 8192 and not 11008 or test_a_flush"
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", chosen]
    environment = {**os.environ, "LAPLACE_KERNELS_SANITIZER": "", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(
        [tool, "--tool", SANITIZER, "--error-exitcode", "9", *command],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
