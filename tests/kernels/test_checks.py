"""Every argument that does not fit is refused with an error that names it."""

from __future__ import annotations

import pytest
import torch

import laplace_kernels as lk

F64, BF16 = torch.float64, torch.bfloat16
META = torch.device("meta")


def zeros(*shape, dtype=torch.float32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


def keep(*shape, device=None):
    return torch.ones(shape, dtype=torch.bool, device=device)


GRAM = {
    "X not a tensor": (TypeError, r"X must be a tensor, got list", {"X": [[1.0]]}),
    "X integer": (
        TypeError,
        r"X must be bfloat16, .*, got torch.int64",
        {"X": zeros(5, 3, dtype=torch.int64)},
    ),
    "X 3-d": (ValueError, r"X must have 2 dimensions, got shape \(2, 5, 3\)", {"X": zeros(2, 5, 3)}),
    "C not a tensor": (TypeError, r"C must be a tensor, got NoneType", {"C": None}),
    "C 1-d": (ValueError, r"C must have 2 dimensions", {"C": zeros(3)}),
    "C wrong size": (
        ValueError,
        r"C must have shape \(3, 3\) to match X \(5, 3\), got \(4, 4\)",
        {"C": zeros(4, 4)},
    ),
    "C fp64": (TypeError, r"C must be torch.float32 for X in torch.float32", {"C": zeros(3, 3, dtype=F64)}),
    "C fp32 for fp64": (TypeError, r"C must be torch.float64 for X", {"X": zeros(5, 3, dtype=F64)}),
    "C bf16": (
        TypeError,
        r"C must be torch.float32",
        {"X": zeros(5, 3, dtype=BF16), "C": zeros(3, 3, dtype=BF16)},
    ),
    "C transposed": (ValueError, r"C must have contiguous rows", {"C": zeros(3, 3).T}),
    "C expanded": (ValueError, r"C must have rows that do not overlap", {"C": zeros(1, 3).expand(3, 3)}),
    "C elsewhere": (
        ValueError,
        r"C must be on the device of X, cpu, got meta",
        {"C": zeros(3, 3, device=META)},
    ),
    "mask float": (TypeError, r"mask must be a bool tensor.*got torch.float32", {"mask": zeros(5)}),
    "mask list": (TypeError, r"mask must be a bool tensor.*got list", {"mask": [True] * 5}),
    "mask shape": (ValueError, r"mask must have shape \(5,\), got \(4,\)", {"mask": keep(4)}),
    "mask elsewhere": (ValueError, r"mask must be on cpu, got meta", {"mask": keep(5, device=META)}),
    "alpha tensor": (TypeError, r"alpha must be a Python number", {"alpha": torch.tensor(1.0)}),
}


@pytest.mark.parametrize("case", GRAM)
def test_gram(case):
    error, message, changed = GRAM[case]
    with pytest.raises(error, match=message):
        lk.gram_(**{"C": zeros(3, 3), "X": zeros(5, 3), **changed})


SKETCH = {
    "X": (ValueError, r"X must have 2 dimensions", {"X": zeros(5)}),
    "Omega 1-d": (ValueError, r"Omega must have 2 dimensions", {"Omega": zeros(3)}),
    "Omega rows": (ValueError, r"Omega must have shape \(3, 2\) to match X", {"Omega": zeros(4, 2)}),
    "Omega fp64": (
        TypeError,
        r"Omega and X must both be float64 or neither",
        {"Omega": zeros(3, 2, dtype=F64)},
    ),
    "Omega elsewhere": (
        ValueError,
        r"Omega must be on the device of X",
        {"Omega": zeros(3, 2, device=META)},
    ),
    "Y shape": (ValueError, r"Y must have shape \(3, 2\)", {"Y": zeros(3, 3)}),
    "Y dtype": (TypeError, r"Y must be torch.float32", {"Y": zeros(3, 2, dtype=BF16)}),
    "mask": (ValueError, r"mask must have shape \(5,\)", {"mask": keep(3)}),
    "alpha": (TypeError, r"alpha must be a Python number", {"alpha": torch.tensor(1.0)}),
}


@pytest.mark.parametrize("case", SKETCH)
def test_gram_sketch(case):
    error, message, changed = SKETCH[case]
    with pytest.raises(error, match=message):
        lk.gram_sketch_(**{"Y": zeros(3, 2), "X": zeros(5, 3), "Omega": zeros(3, 2), **changed})


GROUP = {
    "Xs short": (ValueError, r"Xs must have as many members as Cs \(2\), got 1", {"Xs": [zeros(5, 3)]}),
    "masks long": (ValueError, r"masks must have as many", {"masks": [None] * 3}),
    "alphas short": (ValueError, r"alphas must have as many", {"alphas": [1.0]}),
    "member X": (ValueError, r"Xs\[1\] must have 2 dimensions", {"Xs": [zeros(5, 3), zeros(3)]}),
    "member C": (ValueError, r"Cs\[1\] must have shape", {"Cs": [zeros(3, 3), zeros(3, 3)]}),
    "member mask": (TypeError, r"masks\[1\] must be a bool tensor", {"masks": [None, zeros(1)]}),
    "member alpha": (TypeError, r"alphas\[0\] must be a Python", {"alphas": [torch.tensor(1.0), 1.0]}),
    "mixed dtypes": (
        ValueError,
        r"Xs\[1\] must have the dtype",
        {"Xs": [zeros(5, 3), zeros(1, 2, dtype=BF16)]},
    ),
}


@pytest.mark.parametrize("case", GROUP)
def test_gram_group(case):
    error, message, changed = GROUP[case]
    good = {"Cs": [zeros(3, 3), zeros(2, 2)], "Xs": [zeros(5, 3), zeros(1, 2)]}
    with pytest.raises(error, match=message):
        lk.gram_group_(**{**good, **changed})


JACOBIAN = {
    "small 3-d": (ValueError, r"small must have 4 dimensions", {"small": zeros(2, 5, 4)}),
    "large 3-d": (ValueError, r"large must have 4 dimensions", {"large": zeros(2, 5, 6)}),
    "basis 1-d": (ValueError, r"basis must have 2 dimensions", {"basis": zeros(6)}),
    "classes": (ValueError, r"same number of classes, or 1, got 3 and 2", {"large": zeros(2, 2, 5, 6)}),
    "no classes": (ValueError, r"same number of classes, or 1, got 0 and 1", {"small": zeros(2, 0, 5, 4)}),
    "tokens": (
        ValueError,
        r"large must have shape \(2, 1, 5, 6\) to match small",
        {"large": zeros(2, 1, 4, 6)},
    ),
    "examples": (ValueError, r"large must have shape", {"large": zeros(1, 1, 5, 6)}),
    "large fp64": (TypeError, r"large and small must both", {"large": zeros(2, 1, 5, 6, dtype=F64)}),
    "large elsewhere": (
        ValueError,
        r"large must be on the device",
        {"large": zeros(2, 1, 5, 6, device=META)},
    ),
    "basis rows": (ValueError, r"basis must have shape \(6, 2\) to match large", {"basis": zeros(5, 2)}),
    "basis fp64": (TypeError, r"basis and large must both", {"basis": zeros(6, 2, dtype=F64)}),
    "mask shape": (ValueError, r"mask must have shape \(2, 5\)", {"mask": keep(5)}),
    "mask int": (TypeError, r"mask must be a bool tensor", {"mask": zeros(2, 5, dtype=torch.int64)}),
}


@pytest.mark.parametrize("case", JACOBIAN)
def test_jacobian_stats(case):
    error, message, changed = JACOBIAN[case]
    good = {"small": zeros(2, 3, 5, 4), "large": zeros(2, 1, 5, 6), "basis": zeros(6, 2)}
    with pytest.raises(error, match=message):
        lk.jacobian_stats(**{**good, **changed})


KRON = {
    "W 2-d": (ValueError, r"W must have 3 dimensions", {"W": zeros(2, 6)}),
    "W half-precision int": (TypeError, r"W must be bfloat16", {"W": zeros(1, 2, 6, dtype=torch.int32)}),
    "U wide": (ValueError, r"U must have orthonormal columns, at most d = 6", {"U": zeros(6, 7)}),
    "U rows": (ValueError, r"U must have shape \(6, 3\) to match W", {"U": zeros(5, 3)}),
    "V": (ValueError, r"V must have shape \(2, 2\)", {"V": zeros(3, 3)}),
    "core": (ValueError, r"core must have shape \(2, 3\)", {"core": zeros(2, 4)}),
    "tail": (ValueError, r"tail must have shape \(2,\)", {"tail": zeros(3)}),
    "tail 2-d": (ValueError, r"tail must have 1 dimensions", {"tail": zeros(2, 1)}),
    "V fp64": (TypeError, r"V and W must both be float64", {"V": zeros(2, 2, dtype=F64)}),
    "core elsewhere": (ValueError, r"core must be on the device of W", {"core": zeros(2, 3, device=META)}),
}


@pytest.mark.parametrize("case", KRON)
def test_kron_apply(case):
    error, message, changed = KRON[case]
    good = {"W": zeros(1, 2, 6), "U": zeros(6, 3), "V": zeros(2, 2), "core": zeros(2, 3), "tail": zeros(2)}
    with pytest.raises(error, match=message):
        lk.kron_apply(**{**good, **changed})


@pytest.mark.parametrize(
    ("C", "error", "message"),
    [
        (zeros(3, 4), ValueError, r"C must be square, got \(3, 4\)"),
        (zeros(3), ValueError, r"C must have 2 dimensions"),
        (zeros(3, 3, dtype=torch.int64), TypeError, r"C must be bfloat16"),
    ],
)
def test_mirror(C, error, message):
    with pytest.raises(error, match=message):
        lk.mirror_(C)
