from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import laplace_kernels as lk
from laplace_kernels import dispatch
from tests.kernels import inputs, oracles

torch.set_num_threads(1)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_sees_through_every_op(backend, dynamic):
    generator = torch.Generator().manual_seed(0)
    X, Omega = torch.randn(9, 6), torch.randn(6, 2)
    keep = inputs.poisoned_mask(X, generator)
    W, U, V = torch.randn(2, 3, 6), inputs.orthogonal(6, 2, generator).float(), torch.eye(3)

    def everything(X, keep):
        C, Y, G = torch.zeros(6, 6), torch.zeros(6, 2), torch.zeros(6, 6)
        lk.gram_(C, X, keep, alpha=0.5)
        lk.gram_sketch_(Y, X, Omega, keep)
        lk.gram_group_([G], [X], [keep])
        clean = torch.where(keep[:, None], X, 0)
        P, D = lk.jacobian_stats(clean[None, None, :, :3], clean[None, None], Omega)
        out = lk.kron_apply(W, U, V, torch.ones(3, 2), torch.full((3,), 2.0))
        return C.tril(), Y, G.tril(), P, D, out

    compiled = torch.compile(everything, fullgraph=True, backend=backend, dynamic=dynamic)(X, keep)
    for actual, expected in zip(compiled, everything(X, keep), strict=True):
        assert torch.equal(actual, expected)
    oracles.assert_near(compiled[0], 0.5 * oracles.gram(X, keep).tril())


def test_compiled_calls_become_ops():
    graphs = []

    def record(graph, _):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    torch.compile(lambda C, X: lk.gram_(C, X), fullgraph=True, backend=record)(
        torch.zeros(2, 2), torch.ones(3, 2)
    )
    assert (
        torch.ops.laplace_kernels.gram_ in graphs[0] or torch.ops.laplace_kernels.gram_.default in graphs[0]
    )


@pytest.mark.parametrize("op", lk.OPS)
def test_explain_names_the_reference_on_cpu(op):
    choice = lk.explain(op, "cpu", torch.bfloat16)
    assert (choice.op, choice.backend) == (op, "reference")
    assert choice.reason == "it is the first that can serve"
    assert set(choice.others) == set(lk.backends()) - {"reference"}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"op must be one of gram_, .*, got 'gram'"):
        lk.explain("gram")
    with (
        pytest.raises(ValueError, match=r"use_backend must be auto or one of .*reference, got 'fast'"),
        lk.use_backend("fast"),
    ):
        pass


@pytest.fixture
def mirrored():
    """A registered backend whose only op writes 7, serving fp32 on request."""

    def sevens(C, X, mask, alpha):
        C.fill_(7.0)

    def obstacle(op, device, dtype):
        return "" if dtype == torch.float32 else f"it does not read {dtype}"

    before = dispatch._backends
    lk.register_backend(lk.Backend("sevens", obstacle, "it is slow", {"gram_": sevens}))
    yield
    dispatch._backends = before
    dispatch._chosen.clear()
    dispatch._warned.clear()


def served_by_sevens(dtype=torch.float32):
    C = torch.zeros(2, 2)
    lk.gram_(C, torch.ones(3, 2, dtype=dtype))
    return bool((C == 7).all())


@pytest.mark.usefixtures("mirrored")
def test_a_backend_outside_auto_serves_only_when_asked_for():
    assert lk.backends()[0] == "sevens"
    assert not served_by_sevens()
    assert lk.explain("gram_").others["sevens"] == "it is slow"
    with lk.use_backend("sevens"):
        assert served_by_sevens()
        assert lk.explain("gram_").reason == "it was asked for"
        with lk.use_backend("auto"):
            assert not served_by_sevens()
        seen = []
        thread = threading.Thread(target=lambda: seen.append(served_by_sevens()))
        thread.start()
        thread.join()
        assert seen == [True]  # autograd runs backward hooks in threads of its own
    assert not served_by_sevens()


@pytest.mark.usefixtures("mirrored")
def test_a_request_that_cannot_be_met_falls_back_with_one_warning():
    with lk.use_backend("sevens"):
        with pytest.warns(UserWarning, match="does not read torch.bfloat16"):
            assert not served_by_sevens(torch.bfloat16)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not served_by_sevens(torch.bfloat16)
    with lk.use_backend("sevens"):
        choice = lk.explain("kron_apply")
    assert choice.reason == "sevens was asked for, but it has no kron_apply"


@pytest.mark.usefixtures("mirrored")
def test_a_backend_in_auto_is_preferred_to_the_reference():
    sevens = dispatch._backends["sevens"]
    lk.register_backend(lk.Backend("sevens", sevens.obstacle, kernels=sevens.kernels))
    assert served_by_sevens()
    assert lk.explain("gram_").backend == "sevens"
    with lk.use_backend("reference"):
        assert not served_by_sevens()


@pytest.mark.parametrize(
    ("name", "expected"), [("reference", "it was asked for"), ("nonsense", "ValueError")]
)
def test_environment_variable(name, expected):
    code = "import laplace_kernels as lk; print(lk.explain('gram_').reason)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LAPLACE_KERNELS_BACKEND": name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert expected in run.stdout + run.stderr
