"""The kernels themselves, on the emulated GPU, against fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cuda import emulation
from tests.kernels import inputs, oracles

pytestmark = emulation.needs_host_compiler
DTYPES = [torch.bfloat16, torch.float16]
dtypes = st.sampled_from(DTYPES)
# Omega and Z enter the products in two parts each, with a rounding error of 2^-18; fp32 sums add theirs
TOLERANCE = 1e-5


def rows(T, d, dtype, generator, aligned=True):
    """[T, d] with NaN around it, rows at multiples of 16 bytes or not."""
    pitch = -(-d // 8) * 8 + 8 if aligned else d + 1 + d % 2
    big = torch.full((T + 1, pitch), torch.nan, dtype=dtype)
    return big[:T, :d].copy_(torch.randn(T, d, generator=generator))


def padded(*shape, value=torch.nan):
    """A fp32 matrix with `value` around it."""
    n, m = shape
    return torch.full((n + 1, -(-m // 4) * 4 + 4), value)[:n, :m]


def untouched(matrix, value):
    base = matrix._base
    return bool((base[len(matrix) :] == value).all() and (base[:, matrix.shape[1] :] == value).all())


def sketch_problem(T, d, m, dtype, masked, seed, aligned=True):
    generator = torch.Generator().manual_seed(seed)
    X = rows(T, d, dtype, generator, aligned)
    mask = inputs.poisoned_mask(X, generator) if masked else None
    Omega = padded(d, m).copy_(torch.randn(d, m, generator=generator))
    Y = padded(d, m, value=7.0)
    Y.fill_(1.0)
    return Y, X, Omega, mask


def check_sketch(Y, X, Omega, mask, alpha):
    exact = 1 + alpha * oracles.gram_sketch(X, Omega, mask)
    kept = oracles.kept(X, mask).abs()
    assert ((Y - exact).abs() <= TOLERANCE * (1 + kept.T @ (kept @ Omega.double().abs()))).all()
    assert untouched(Y, 7.0)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 200),
    m=st.integers(1, 128),
    ranks=st.sampled_from([1, 2, 4]),
    clusters=st.integers(1, 3),
    deterministic=st.booleans(),
    dtype=dtypes,
    masked=st.booleans(),
    alpha=st.sampled_from([1.0, -0.5]),
    seed=inputs.seeds,
    data=st.data(),
)
def test_cluster_sketch(tokens, m, ranks, clusters, deterministic, dtype, masked, alpha, seed, data):
    tiling = data.draw(st.sampled_from([2] if m > 64 else [0, 1, 2]))
    d = data.draw(st.integers(1, ranks * (512 if tiling == 1 else 256)))
    problem = sketch_problem(tokens, d, m, dtype, masked, seed)
    emulation.gram_sketch_cluster_(
        *problem, alpha, tiling=tiling, ranks=ranks, clusters=clusters, deterministic=deterministic, seed=seed
    )
    check_sketch(*problem, alpha)


@pytest.mark.parametrize(("tiling", "d", "m"), [(0, 4000, 64), (1, 8192, 33), (2, 4090, 128)])
def test_the_largest_cluster(tiling, d, m):
    problem = sketch_problem(70, d, m, torch.bfloat16, True, 0)
    emulation.gram_sketch_cluster_(*problem, tiling=tiling, ranks=16)
    check_sketch(*problem, 1.0)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 150),
    d=st.integers(1, 200),
    m=st.integers(1, 130),
    parts=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    block_tokens=st.sampled_from([64, 100, 1000]),
    deterministic=st.booleans(),
    dtype=dtypes,
    masked=st.booleans(),
    aligned=st.booleans(),
    seed=inputs.seeds,
)
def test_portable_sketch(tokens, d, m, parts, block_tokens, deterministic, dtype, masked, aligned, seed):
    problem = sketch_problem(tokens, d, m, dtype, masked, seed, aligned)
    emulation.gram_sketch_tiles_(
        *problem, -0.5, parts=parts, block_tokens=block_tokens, deterministic=deterministic, seed=seed
    )
    check_sketch(*problem, -0.5)


@pytest.mark.parametrize("serve", ["cluster", "tiles"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-5, 1e3])
def test_large_and_small_numbers_keep_their_precision(serve, dtype, scale):
    """fp16 has no room for Z or Omega: without scaling it overflows here, or loses the small ones."""
    Y, X, Omega, mask = sketch_problem(150, 200, 20, dtype, False, 0)
    X *= scale
    X[100:] *= 5  # the running scale has to follow
    Omega *= torch.logspace(-9, 4, 20)
    Y.zero_()
    if serve == "cluster":
        emulation.gram_sketch_cluster_(Y, X, Omega, mask, ranks=2)
    else:
        emulation.gram_sketch_tiles_(Y, X, Omega, mask)
    exact = oracles.gram_sketch(X, Omega)
    assert torch.isfinite(Y).all()
    assert ((Y - exact).abs().amax(0) <= TOLERANCE * exact.abs().amax(0)).all()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "serve",
    [
        lambda *args, **how: emulation.gram_sketch_cluster_(*args, ranks=2, clusters=3, **how),
        lambda *args, **how: emulation.gram_sketch_tiles_(*args, parts=(3, 3), **how),
    ],
    ids=["cluster", "tiles"],
)
def test_only_deterministic_sums_have_the_same_bits_in_every_order_of_blocks(serve, deterministic):
    results = []
    for seed in range(4):
        Y, *problem = sketch_problem(150, 130, 20, torch.bfloat16, True, 0)
        serve(Y, *problem, deterministic=deterministic, seed=seed)
        results.append(Y.clone())
    assert all(torch.equal(result, results[0]) for result in results) == deterministic


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 150)), min_size=1, max_size=5),
    dtype=dtypes,
    aligned=st.booleans(),
    seed=inputs.seeds,
)
def test_group(shapes, dtype, aligned, seed):
    generator = torch.Generator().manual_seed(seed)
    Xs = [rows(T, d, dtype, generator, aligned) for T, d in shapes]
    masks = [inputs.poisoned_mask(X, generator) if i % 2 else None for i, X in enumerate(Xs)]
    Cs = [padded(d, d, value=7.0).fill_(1.0) for _, d in shapes]
    alphas = [0.5 - i for i in range(len(shapes))]
    emulation.gram_group_(Cs, Xs, masks, alphas, seed=seed)
    for C, X, mask, alpha in zip(Cs, Xs, masks, alphas, strict=True):
        oracles.assert_near(C.tril(), (1 + alpha * oracles.gram(X, mask)).tril())
        assert untouched(C, 7.0)
        assert (C.triu(1) == torch.ones_like(C).triu(1)).all()  # not ours to change, and we do not


def test_group_splits_tokens_among_processors_and_launches_beyond_its_table():
    Xs = [torch.randn(1100, 8).bfloat16(), *(torch.randn(3, 2).bfloat16() for _ in range(501))]
    for processors, split in ((1000, False), (1000, True)):
        Cs = [torch.zeros(X.shape[1], X.shape[1]) for X in Xs]
        nothing = [None] * len(Xs), [1.0] * len(Xs)
        assert emulation.gram_group_(Cs, Xs, *nothing, processors=processors, split=split) == 2
        for C, X in zip(Cs, Xs, strict=True):
            oracles.assert_near(C.tril(), oracles.gram(X).tril())


MUTATIONS = {  # a defect in a kernel that the emulation has to notice
    "a wait for copies": ("gram_sketch_cluster.h", "<Tiling::kStages - 2>", "<Tiling::kStages - 1>"),
    "a buffer of Z": ("gram_sketch_cluster.h", "step % 2) * kZBytes", "step % 1) * kZBytes"),
    "a barrier before copies are read": ("tile.h", "machine.sync();", ""),
    "an operand of ldmatrix": ("layout.h", "lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8", "lane % 16, lane / 16 * 8"),
    "a fence": ("gram_sketch_cluster.h", "machine_.fence_async();\n    machine_.sync();", "machine_.sync();"),
    "a late product": (
        "gram_sketch_cluster.h",
        "      finish_accumulating();\n      machine_.cluster_arrive();",
        "      machine_.cluster_arrive();\n      finish_accumulating();",
    ),
    "a barrier before blocks write to each other": (
        "gram_sketch_cluster.h",
        "machine_.cluster_arrive();  // no block writes to another one's shared memory before that one has started\n"
        "    machine_.cluster_wait();",
        "",
    ),
    "a barrier after the first sum": (
        "gram_sketch_cluster.h",
        "sum(0);\n    machine_.cluster_arrive();\n    machine_.cluster_wait();",
        "sum(0);",
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", MUTATIONS)
def test_the_emulation_notices(defect, monkeypatch, tmp_path):
    monkeypatch.setattr(emulation, "library", lambda: mutant)
    mutant = emulation.build(tmp_path, MUTATIONS[defect])
    assert any(mutant_is_wrong(seed) for seed in range(6))


def mutant_is_wrong(seed):
    problem = sketch_problem(300, 200, 20, torch.bfloat16, False, seed)
    try:
        emulation.gram_sketch_cluster_(*problem, ranks=2, seed=seed)
        check_sketch(*problem, 1.0)
        problem[0].fill_(1.0)
        emulation.gram_sketch_tiles_(*problem, seed=seed)
        check_sketch(*problem, 1.0)
    except AssertionError:
        return True
    return False
