"""The Triton backend seen from outside: it never breaks an import, and says why it does not serve."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
import warnings

import pytest
import torch

import laplace_kernels as lk
from laplace_kernels import dispatch, triton
from tests.kernels import oracles


@pytest.mark.parametrize("op", triton.BACKEND.kernels)
def test_it_is_not_the_default_and_says_so(op):
    assert "not yet run on hardware" in triton.BACKEND.reservation
    assert lk.explain(op, "cpu").others["triton"] == "it needs a GPU"
    assert lk.explain(op, "cpu", torch.float64).others["triton"] == "it does not compute in float64"
    assert lk.explain(op, "meta").others["triton"] == "it does not run on meta"


def test_asked_for_on_a_cpu_it_falls_back_with_one_warning():
    X = torch.randn(5, 3)
    with lk.use_backend("triton"), pytest.warns(UserWarning, match="runs on reference: .* it needs a GPU"):
        C = lk.gram_(torch.zeros(3, 3), X)
    oracles.assert_near(C.tril(), oracles.gram(X).tril())
    dispatch._warned.clear()


def test_without_triton_everything_else_works():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, laplace_kernels as lk\n"
        "from laplace_kernels import triton\n"
        "torch.cuda.is_available = lambda: True\n"
        "print(lk.gram_(torch.zeros(1, 1), torch.ones(3, 1)).item())\n"
        "print(lk.explain('gram_', 'cuda').backend, lk.explain('gram_', 'cuda').others)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("3.0\nreference {'triton': 'its kernel cannot be imported: ")


@pytest.fixture
def on_cpu(monkeypatch):
    """The Triton backend takes CPU tensors, so that its failures can be seen without a GPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr(triton, "_interpreted", lambda: True)
    yield
    for launcher in triton.BACKEND.kernels.values():
        launcher.failure = ""
    dispatch.reconsider()
    dispatch._warned.clear()


def failing_with(monkeypatch, error):
    module = importlib.import_module("laplace_kernels.triton.gram")

    def gram_(*args):
        raise error

    monkeypatch.setattr(module, "gram_", gram_)


def compile_failures():
    if importlib.util.find_spec("triton") is None:
        return []
    from triton.runtime.errors import OutOfResources

    return [
        OutOfResources(300000, 232448, "shared memory"),
        RuntimeError("PassManager::run failed"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        subprocess.CalledProcessError(1, ["gcc"]),
    ]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("error", compile_failures(), ids=str)
def test_a_kernel_that_does_not_compile_is_replaced_with_one_warning(monkeypatch, error):
    failing_with(monkeypatch, error)
    X = torch.randn(5, 3)
    with lk.use_backend("triton"):
        with pytest.warns(UserWarning, match="gram_ runs on reference: triton its kernel does not compile"):
            C = lk.gram_(torch.zeros(3, 3), X)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lk.explain("kron_apply")
        assert f"does not compile: {type(error).__name__}: {error}" in lk.explain("gram_").reason
        assert lk.explain("kron_apply").backend == "triton"
    oracles.assert_near(C.tril(), oracles.gram(X).tril())


@pytest.mark.usefixtures("on_cpu")
def test_other_errors_are_not_swallowed(monkeypatch):
    failing_with(monkeypatch, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with lk.use_backend("triton"), pytest.raises(RuntimeError, match="illegal memory access"):
        lk.gram_(torch.zeros(3, 3), torch.randn(5, 3))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("op", triton.BACKEND.kernels)
def test_a_file_that_cannot_be_imported_is_the_reason_of_its_op_alone(monkeypatch, op):
    monkeypatch.setitem(sys.modules, triton.BACKEND.kernels[op].module, None)
    for other in triton.BACKEND.kernels:
        with lk.use_backend("triton"):
            choice = lk.explain(other)
        if other == op:
            assert choice.backend == "reference"
            assert re.search("its kernel cannot be imported: ModuleNotFoundError: .* halted", choice.reason)
        else:
            assert choice.backend == "triton"


@pytest.mark.usefixtures("on_cpu")
def test_an_op_without_a_kernel_is_alone_in_that(monkeypatch):
    monkeypatch.delitem(triton.BACKEND.kernels, "gram_sketch_")
    with lk.use_backend("triton"):
        assert lk.explain("gram_sketch_").reason == "triton was asked for, but it has no gram_sketch_"
        assert lk.explain("gram_").backend == "triton"


@pytest.mark.parametrize("op", triton.BACKEND.kernels)
def test_every_op_has_its_file(op):
    assert importlib.util.find_spec(triton.BACKEND.kernels[op].module) is not None
    assert triton.BACKEND.kernels[op].op is lk.OPS[op]
