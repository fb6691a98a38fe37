"""What every op promises, whoever has registered it; and that an op from elsewhere is an op like any other."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
import torch

import laplace_kernels as lk
from laplace_kernels import dispatch
from tests.kernels import samples
from tests.kernels.samples import outcome, replaced, sample

torch.set_num_threads(1)
each_op = pytest.mark.parametrize("op", lk.OPS)
has_mask = pytest.mark.parametrize("op", [op for op in lk.OPS if re.search(r"\bmasks?\b", lk.OPS[op].schema)])


@each_op
def test_torch_has_its_schema(op):
    registered = getattr(torch.ops.laplace_kernels, op).default._schema
    assert registered == torch._C.parse_schema(f"laplace_kernels::{lk.OPS[op].schema}")
    assert lk.OPS[op].name == op
    assert lk.OPS[op].probe in lk.OPS[op].arguments


@each_op
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_fake_agrees_with_what_comes_out(op, dtype, masked):
    args = tuple(sample(op, dtype, masked=masked))
    torch.library.opcheck(getattr(torch.ops.laplace_kernels, op).default, args)


@each_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_float_is_accepted_and_summed_in_fp32_or_fp64(op, dtype):
    args = sample(op, dtype)
    for found, exact in zip(outcome(op, args), outcome(op, sample(op, torch.float64)), strict=True):
        assert found.dtype == lk.accumulation_dtype(dtype)
        torch.testing.assert_close(found.double(), exact, rtol=0.1, atol=0.2)


@each_op
def test_a_wrong_dtype_is_refused_by_name(op):
    args = sample(op, masked=True)
    for name, tensor, _ in lk.OPS[op].tensors(args):
        wrong = tensor.to(torch.float32 if tensor.dtype == torch.bool else torch.int64)
        with pytest.raises(TypeError, match=rf"^{re.escape(name)} must "):
            lk.call(lk.OPS[op], *replaced(op, args, {name: wrong}))


@has_mask
def test_a_mask_selects_what_is_not_finite_away(op):
    clean = outcome(op, sample(op, T=30, masked=True))
    poisoned = outcome(op, sample(op, T=30, masked=True, poisoned=True))
    everything = outcome(op, sample(op, T=30))
    assert all(torch.isfinite(found).all() for found in poisoned)
    assert all(torch.equal(*pair) for pair in zip(poisoned, clean, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(clean, everything, strict=True))


@each_op
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_gives_nothing(op, masked):
    assert not any(found.any() for found in outcome(op, sample(op, T=0, masked=masked)))


@each_op
def test_what_is_written_shares_no_memory(op):
    args = sample(op, masked=True)
    for first, second in combinations(lk.OPS[op].tensors(args), 2):
        if not (first[2] or second[2]):
            continue
        memory = torch.zeros(max(first[1].nbytes, second[1].nbytes), dtype=torch.uint8)
        aliases = {
            name: memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for name, tensor, _ in (first, second)
        }
        written, other = (first, second) if first[2] else (second, first)
        message = f"^{re.escape(written[0])} must not share memory with {re.escape(other[0])}$"
        for call in (lambda *args: lk.call(lk.OPS[op], *args), getattr(torch.ops.laplace_kernels, op)):
            with pytest.raises(ValueError, match=message):
                call(*replaced(op, args, aliases))


@each_op
def test_fp32_is_multiplied_in_fp32_whatever_the_process_allows(op):
    """Where the CPU has instructions for bf16, "medium" changes a plain product of this size."""
    expected = outcome(op, sample(op, T=600, d=300))
    torch.set_float32_matmul_precision("medium")
    try:
        found = outcome(op, sample(op, T=600, d=300))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@each_op
def test_autocast_does_not_reach_it(op):
    expected = outcome(op, sample(op))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outcome(op, sample(op))
        args = sample(op)
        getattr(torch.ops.laplace_kernels, op)(*args)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    written = [tensor for _, tensor, changed in lk.OPS[op].tensors(args) if changed]
    assert all(
        torch.equal(*pair) for pair in zip(written, expected[len(expected) - len(written) :], strict=True)
    )


@each_op
def test_meta_tensors_go_through(op):
    meta = {name: tensor.to("meta") for name, tensor, _ in lk.OPS[op].tensors(sample(op))}
    for found, real in zip(outcome(op, replaced(op, sample(op), meta)), outcome(op, sample(op)), strict=True):
        assert (found.device.type, found.shape, found.dtype) == ("meta", real.shape, real.dtype)


# An op from outside the package.


def check_toy(Y, X, mask):
    if X.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise TypeError(f"X must be of floats, got {X.dtype}")
    if Y.dtype != lk.accumulation_dtype(X.dtype):
        raise TypeError(f"Y must be {lk.accumulation_dtype(X.dtype)}, got {Y.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")


def fake_toy(Y, X, mask):
    return X.new_empty(X.shape[1], dtype=Y.dtype)


def toy(Y, X, mask):
    """Y += the sum of the rows of X that count; returns the sum of their squares."""
    X = X.to(Y.dtype) if mask is None else torch.where(mask[:, None], X.to(Y.dtype), 0)
    Y += X.sum(0)
    return (X * X).sum(0)


def sample_toy(make, T, d):
    X = make.rows(T, d)
    return [make.zeros(d), X, make.mask(X)]


@pytest.fixture(scope="module")
def toy_op():
    op = lk.register_op(
        lk.Op(
            "toy_(Tensor(a!) Y, Tensor X, Tensor? mask) -> Tensor",
            probe="X",
            check=check_toy,
            reference=toy,
            fake=fake_toy,
        )
    )
    samples._SAMPLES["toy_"] = sample_toy
    yield op
    del samples._SAMPLES["toy_"], dispatch._ops["toy_"], dispatch._reference.kernels["toy_"]


@pytest.mark.usefixtures("toy_op")
def test_an_op_from_elsewhere_keeps_the_contract():
    test_torch_has_its_schema("toy_")
    for dtype in (torch.bfloat16, torch.float64):
        test_the_fake_agrees_with_what_comes_out("toy_", dtype, masked=True)
        test_every_float_is_accepted_and_summed_in_fp32_or_fp64("toy_", dtype)
    test_a_wrong_dtype_is_refused_by_name("toy_")
    test_a_mask_selects_what_is_not_finite_away("toy_")
    test_nothing_gives_nothing("toy_", masked=True)
    test_what_is_written_shares_no_memory("toy_")
    test_fp32_is_multiplied_in_fp32_whatever_the_process_allows("toy_")
    test_autocast_does_not_reach_it("toy_")
    test_meta_tensors_go_through("toy_")


def test_an_op_from_elsewhere_is_compiled(toy_op):
    Y, X, mask = sample("toy_", masked=True)

    def doubled(Y, X):
        return lk.call(toy_op, Y, X, mask) * 2, Y

    expected = doubled(Y.clone(), X)
    found = torch.compile(doubled, fullgraph=True, backend="aot_eager")(Y, X)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_backend_may_get_a_kernel_for_it(toy_op, monkeypatch):
    monkeypatch.setattr(dispatch, "_backends", dict(dispatch._backends))
    lk.register_backend(lk.Backend("sevens", obstacle=lambda op, device, dtype: ""))
    assert lk.explain("toy_").others["sevens"] == "it has no toy_"
    lk.register_kernel("sevens", "toy_", lambda Y, X, mask: Y.fill_(7.0))
    assert lk.explain("toy_").backend == "sevens"
    assert lk.explain("gram_").backend == "reference"
    assert (lk.call(toy_op, *sample("toy_")) == 7).all()
    dispatch.reconsider()


def test_a_name_is_taken_once(toy_op):
    with pytest.raises(ValueError, match="there is an op toy_ already"):
        lk.register_op(toy_op)


@pytest.mark.parametrize(
    ("backend", "op", "message"),
    [
        ("fast", "gram_", "backend must be one of .*reference, got 'fast'"),
        ("cuda", "gram", "op must be one of gram_, .*, got 'gram'"),
    ],
)
def test_kernels_of_nothing_are_refused(backend, op, message):
    with pytest.raises(ValueError, match=message):
        lk.register_kernel(backend, op, print)
