"""Functions of examples against sums over sequences, written out, and against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laplace_lora_fast.likelihoods import Categorical
from laplace_lora_fast.likelihoods.functions import Functions, Group, OneSequence

GROUP = [3, 0, 1, 3, 2, 0, 1, 1, 2, 3]  # two examples of two sequences, two of three, in no order
MEMBERS = [[1, 5], [2, 6, 7], [4, 8], [0, 3, 9]]
SIZES = [1, 2]  # functions of an example with two and with three sequences


def contrasts(outputs: int) -> Tensor:
    return Categorical().functions(outputs).double()


def grouped() -> Group:
    return Group(torch.tensor(GROUP), {size: contrasts(size) for size in (2, 3)}, torch.device("cpu"))


def one_sequence() -> OneSequence:
    return OneSequence(10, contrasts(4))


def scores(outputs: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs x [S, U, P] and weights w [P] of u = x w."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(10, outputs, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(6, generator=generator, dtype=torch.float64)


def test_a_group_is_its_sequences_in_their_order() -> None:
    functions = grouped()
    assert (functions.n_examples, functions.one_sequence, functions.sizes) == (4, False, SIZES)
    assert [each.tolist() for each in functions.examples] == [[0, 2], [1, 3]]
    x, w = scores()
    u = x @ w
    blocks = zip(functions.examples, functions.outputs(u), functions.values(u), strict=True)
    for examples, outputs, values in blocks:
        for n, own, value in zip(examples.tolist(), outputs, values, strict=True):
            assert torch.equal(own, u[MEMBERS[n], 0])
            torch.testing.assert_close(value, own[1:] - own[0])


@pytest.mark.parametrize(("make", "outputs"), [(grouped, 1), (one_sequence, 4)])
def test_rows_are_the_jacobian_of_the_functions(make: type[Functions], outputs: int) -> None:
    functions, (x, w) = make(), scores(outputs)
    plain = functions.plain(x @ w)
    passes = [torch.einsum("su,sup->sp", plain[:, :, k], x) for k in range(plain.shape[2])]
    found = functions.combine(passes)
    for index, rows in enumerate(found):
        expected = torch.autograd.functional.jacobian(lambda w, i=index: functions.values(x @ w)[i], w)
        torch.testing.assert_close(rows, expected)
    assert [len(rows) for rows in found] == [len(examples) for examples in functions.examples]


@pytest.mark.parametrize(("make", "outputs"), [(grouped, 1), (one_sequence, 4)])
def test_cotangents_of_outputs_reach_the_sequences(make: type[Functions], outputs: int) -> None:
    """One pass a cotangent; blocks with fewer of them get zeros. Summed by example, rows are those of each example."""
    functions, (x, w) = make(), scores(outputs)
    generator = torch.Generator().manual_seed(1)
    shapes = [block.shape for block in functions.outputs(x @ w)]
    cotangents = [
        torch.randn(*shape, 2 + index, generator=generator, dtype=torch.float64)
        for index, shape in enumerate(shapes)
    ]
    spread = functions.spread(cotangents)
    passes = max(each.shape[2] for each in cotangents)
    assert spread.shape == (10, outputs, passes)
    for k in range(passes):
        found = functions.by_example(torch.einsum("su,sup->sp", spread[:, :, k], x))
        expected = torch.zeros_like(found)
        for index, (examples, each) in enumerate(zip(functions.examples, cotangents, strict=True)):
            if k < each.shape[2]:
                jacobian = torch.autograd.functional.jacobian(
                    lambda w, i=index: functions.outputs(x @ w)[i], w
                )
                expected[examples] = torch.einsum("nc,ncp->np", each[:, :, k], jacobian)
        torch.testing.assert_close(found, expected)
