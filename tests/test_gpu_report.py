"""The GPU report's machinery, which has to survive what it measures: crashes, hangs, failing tests."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import laplace_kernels as lk
from bench.gpu import gate, output, smoke, tree
from bench.gpu.isolated import run_cases
from bench.gpu_report import begin
from laplace_kernels import dispatch

LOG = """
[gw1] [  1%] PASSED tests/gpu/test_kernels.py::test_gram[reference-0-8-False-dtype0]
[gw0] [  2%] PASSED tests/gpu/test_kernels.py::test_gram[triton-0-8-False-dtype0]
[gw0] [  2%] FAILED tests/gpu/test_kernels.py::test_gram[triton-70-33-False-dtype0]
[gw0] [  2%] SKIPPED tests/gpu/test_cuda_kernels.py::test_compute_sanitizer
tests/gpu/test_cuda_kernels.py::test_gram_group[dtype0] some words in between
FAILED tests/gpu/test_kernels.py::test_gram[triton-70-33-False-dtype0]
[gw2] [  3%] PASSED tests/gpu/test_fit.py::test_no_batch_waits_for_the_device[reference-KFAC(tokens='expand')]
[gw2] [  3%] PASSED tests/gpu/test_fit.py::test_a_word[triton, for one]
[gw3] [  4%] ERROR tests/gpu/test_fit.py::test_of_no_backend
"""


def test_outcomes_of_a_log_name_what_may_be_measured() -> None:
    tests = gate.outcomes(LOG)
    assert tests["passed"] == 4
    assert tests["skipped"] == 1
    failing = "tests/gpu/test_kernels.py::test_gram[triton-70-33-False-dtype0]"
    assert tests["failed"] == [failing, "tests/gpu/test_fit.py::test_of_no_backend"]
    assert tests["backends"] == {"triton": 2, "cuda": 0, "reference": 2}
    refused = gate.refused(tests)
    assert failing in refused["triton"]
    assert "none of its tests passed" in refused["cuda"]
    assert "reference" not in refused


def behave(case: str) -> Iterator[dict[str, Any]]:
    """Yields a record, and then does what the case is called."""
    yield {"case": case, "pid": os.getpid()}
    if case == "raises":
        raise RuntimeError("out of memory")
    if case == "crashes":
        os._exit(7)
    if case == "hangs":
        time.sleep(600)


def describe(case: str) -> dict[str, Any]:
    return {"case": case}


@pytest.mark.slow
def test_what_breaks_a_process_is_recorded_and_the_rest_goes_on() -> None:
    cases = ["one", "two", "raises", "crashes", "hangs", "three"]
    records = list(run_cases(cases, describe, behave, 40.0, time.monotonic() + 600))
    measured = [record for record in records if "pid" in record]
    assert [record["case"] for record in measured] == cases
    assert measured[0]["pid"] == measured[1]["pid"] == measured[2]["pid"]
    assert len({record["pid"] for record in measured}) == 4
    failed = {record["case"]: record["failed"] for record in records if "failed" in record}
    assert list(failed) == ["raises", "crashes", "hangs"]
    assert failed["raises"] == "RuntimeError: out of memory"
    assert "exit code 7" in failed["crashes"]
    assert "hangs" in failed["hangs"]


def test_what_is_not_begun_in_time_says_so() -> None:
    records = list(run_cases(["one", "two"], describe, behave, 20.0, time.monotonic() - 1))
    assert records == [{"case": case, "skipped": "out of time"} for case in ("one", "two")]


def test_only_a_report_of_the_same_commit_is_extended(tmp_path: Path) -> None:
    report = begin(dry=True, commit="abc", earlier=None) | {"ops": [1, 2]}
    path = tmp_path / "gpu_report.json"
    path.write_text(json.dumps(report))
    assert begin(dry=True, commit="abc", earlier=path)["ops"] == [1, 2]
    with pytest.raises(SystemExit, match="commit"):
        begin(dry=True, commit="def", earlier=path)


def test_the_packages_of_the_tree_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    tree.require()
    monkeypatch.setattr(tree, "ROOT", Path("/elsewhere"))
    with pytest.raises(SystemExit, match="is not of /elsewhere"):
        tree.require()


def test_a_smoke_test_tells_wrong_from_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op is right; one that is not, or breaks, is noticed, and its backend refused."""
    for case in smoke.cases(dry=True):
        (record,) = smoke.measure(case, "cpu")
        assert record["right"]
        assert record["error"] < 1e-5
    case = smoke.cases(dry=True)[0]

    def wrong(Z: Any, X: Any, W: Any) -> None:
        Z.fill_(float("nan"))

    def broken(Z: Any, X: Any, W: Any) -> None:
        raise RuntimeError("no such kernel")

    for kernel in (wrong, broken):
        lk.register_backend(
            lk.Backend("mine", lambda op, device, dtype: "no fp64" if dtype == torch.float64 else "")
        )
        lk.register_kernel("mine", "project_", kernel)
        try:
            records = list(smoke.measure(case, "cpu"))
        finally:
            dispatch._backends.pop("mine")
            dispatch.reconsider()
        assert [(record["backend"], record["right"]) for record in records] == [
            ("mine", False),
            ("reference", True),
        ]
        assert smoke.refused(records) == {"mine": "project_ is wrong"}


def test_tables_of_what_a_fit_costs() -> None:
    spread = {"median": 0.2, "p20": 0.1, "p80": 0.3}
    common = {"model": "m", "targets": "q, v", "batch": "b", "seconds": spread, "host_seconds": spread}
    fits = [common | {"job": job, "end_seconds": 1.5} for job in ("bare passes", "fit, rows")]
    fits[1] |= {
        "seconds": {name: 2 * value for name, value in spread.items()},
        "kernels": 70,
        "busy_seconds": 0.05,
    }
    text = output.markdown(
        {"dry": False, "environment": {}, "fits": [*fits, {"model": "m", "targets": "t", "failed": "x"}]}
    )
    assert "| fit, rows | 400.0 (200.0-600.0) | +100.0% | 200.0 | 50.0 | 70 | 1.50 |  |" in text
    assert "failed: x" in text
