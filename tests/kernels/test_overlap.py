"""Memory shared with something that is written: refused exactly where elements are shared."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import laplace_kernels as lk
from laplace_kernels.overlap import refuse_overlap


def overlaps(a, b, written=(True, False)):
    try:
        refuse_overlap([("a", a, written[0]), ("b", b, written[1])])
    except ValueError:
        return True
    return False


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (lambda m: m[:4, :4], lambda m: m[:4, :4]),
        (lambda m: m[:4, :4], lambda m: m[3:, 3:]),
        (lambda m: m[:4, :4], lambda m: m[:4, 3:].T),
        (lambda m: m[:, :4], lambda m: m[:, 4:]),
        (lambda m: m[:, :4], lambda m: m[:, 5:6]),
        (lambda m: m[:, ::2], lambda m: m[:, 1::2]),
        (lambda m: m[::2], lambda m: m[1::2]),
        (lambda m: m[::2, :3], lambda m: m[1:, 2:]),
        (lambda m: m[:3], lambda m: m[3:]),
        (lambda m: m[:0], lambda m: m),
        (lambda m: m[:, :4], lambda m: m[:1, 2:3].expand(5, 3)),
        (lambda m: m[:, :4], lambda m: m.view(torch.uint8)[:, 15:17]),
        (lambda m: m[:, :4], lambda m: m.view(torch.uint8)[:, 16:]),
    ],
)
def test_views_of_one_buffer(a, b):
    memory = torch.zeros(8, 8)
    marks = memory.view(torch.uint8)
    a(memory).fill_(1.0)  # in fp32 this marks every byte but the lowest two
    shared = bool(b(marks if b(memory).dtype == torch.uint8 else memory).count_nonzero())
    assert overlaps(a(memory), b(memory)) == shared
    assert overlaps(b(memory), a(memory), (False, True)) == shared
    assert not overlaps(a(memory), b(memory), (False, False))


blocks = st.tuples(
    st.integers(0, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5), st.integers(1, 4)
)


@settings(max_examples=200, deadline=None)
@given(blocks, blocks, st.booleans())
def test_no_shared_element_goes_unseen(first, second, transposed):
    memory = torch.arange(100).view(10, 10)

    def view(block):
        row, rows, step, column, columns = block
        return memory[row : row + rows * step : step, column : column + columns]

    a, b = view(first), view(second).T if transposed else view(second)
    shared = bool(set(a.flatten().tolist()) & set(b.flatten().tolist()))
    assert overlaps(a, b) or not shared
    if first[2] == second[2] == 1:
        assert overlaps(a, b) == shared


def test_memory_from_elsewhere():
    array = torch.zeros(10).numpy()
    assert overlaps(torch.from_numpy(array)[:6], torch.from_numpy(array[5:]))
    assert not overlaps(torch.from_numpy(array)[:5], torch.from_numpy(array[5:]))


def test_two_of_many_are_named_what_is_written_first():
    memory = torch.zeros(100)
    tensors = [(f"C{i}", memory[10 * i : 10 * i + 10], True) for i in range(10)]
    refuse_overlap(tensors)
    refuse_overlap([*tensors, *[("X", torch.zeros(10), False)] * 3])
    with pytest.raises(ValueError, match=r"^C7 must not share memory with X$"):
        refuse_overlap([("X", memory[75:76], False), *tensors])
    with pytest.raises(ValueError, match=r"^C3 must not share memory with Y$"):
        refuse_overlap([*tensors, ("Y", memory[39:40], True)])


def test_accumulators_side_by_side_in_one_buffer():
    X, memory = torch.randn(6, 4), torch.zeros(4, 8)
    lk.gram_group_([memory[:, :4], memory[:, 4:]], [X, X])
    torch.testing.assert_close(memory[:, :4].tril(), (X.T @ X).tril())
    assert torch.equal(memory[:, :4].tril(), memory[:, 4:].tril())


def test_what_has_no_memory_overlaps_nothing():
    with FakeTensorMode():
        lk.gram_(torch.zeros(4, 4), torch.ones(6, 4))
    lk.gram_(torch.zeros(4, 4, device="meta"), torch.ones(6, 4, device="meta"))
    C, X = torch.zeros(3, 4, 4), torch.randn(3, 6, 4)
    torch.vmap(lk.gram_)(C, X)
    torch.testing.assert_close(C.tril(), (X.mT @ X).tril())
