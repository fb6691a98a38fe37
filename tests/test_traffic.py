"""What a fit moves on a GPU, and in how many launches: counted on the meta device, and kept."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import product

import pytest
import torch

from bench import ends, traffic
from bench.traffic import Case, Meter, count
from laplace_lora_fast.structures.rows.kernels import RowKernels

# Bytes over one read of every distinct x and every g, and launches a layer and pass.
ROWS = {("q, v", False): (1.5, 2.0), ("q, v", True): (1.8, 2.5), ("all linear", False): (1.4, 2.0)}
ROWS |= {("all linear", True): (1.6, 2.5)}
KFAC_REDUCE = (1.15, 2.0)


@pytest.mark.parametrize("texts", traffic.TEXTS)
@pytest.mark.parametrize(("targets", "padded"), ROWS)
@pytest.mark.parametrize("model", traffic.SHAPES)
def test_rows_cost_little_more_than_one_read(model: str, targets: str, padded: bool, texts: str) -> None:
    counts = count(Case(model, targets, "rows", padded, 2, texts))
    most_bytes, most_launches = ROWS[targets, padded]
    assert 1 < counts.over_floor <= most_bytes
    assert counts.launches_a_stream <= most_launches


@pytest.mark.parametrize("padded", [False, True])
def test_rows_of_several_passes(padded: bool) -> None:
    counts = count(Case("Llama-2-7B", "q, v", "rows", padded, 5, "long"))
    assert 1 < counts.over_floor <= ROWS["q, v", padded][0]
    assert counts.launches_a_stream <= ROWS["q, v", padded][1]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("targets", traffic.TARGETS)
def test_kfac_of_reduced_tokens(targets: str, padded: bool) -> None:
    counts = count(Case("Llama-2-7B", targets, "KFAC reduce", padded, 2, "long"))
    most_bytes, most_launches = KFAC_REDUCE
    assert 1 < counts.over_floor <= most_bytes
    assert counts.launches_a_stream <= most_launches


def test_what_is_counted() -> None:
    x, y = torch.empty(8, 4, device="meta"), torch.empty(1, 4, device="meta").expand(8, 4)
    for operation, moved in {
        lambda: x + y: 8 * 4 * 2 + 4,
        lambda: x.add_(1): 8 * 4 * 2,
        lambda: x.copy_(y): 8 * 4 + 4,
        lambda: torch.mm(x, x.mT, out=torch.empty(8, 8, device="meta")): 2 * 8 * 4 + 64,
        lambda: x.view(32)[3:]: 0,
        lambda: torch.ones(3) + 1: 0,
    }.items():
        with Meter() as meter:
            operation()
        assert meter.bytes == 4 * moved
        assert sum(meter.launches.values()) == (moved > 0)


def test_the_table_holds_every_case() -> None:
    """`python -m bench.traffic` writes it: run it after a change of what a fit does."""
    records = json.loads((traffic.RESULTS / "traffic.json").read_text())
    assert [record["case"] for record in records] == [asdict(case) for case in traffic.cases()]
    found = {tuple(record["case"].values()): record["count"] for record in records}
    for case in [Case("Llama-2-7B", "q, v", "rows", padded, 2, "long") for padded in (False, True)]:
        assert found[tuple(asdict(case).values())] == asdict(count(case))
    assert {record["case"]["classes"] for record in records} == {2, 5}
    assert len(records) == len(list(product(range(2), repeat=6)))


def test_what_ends_of_fits_compute() -> None:
    rows = [ends.empty(50, 8 * 16, dtype=torch.float16) for _ in range(3)]
    omegas = [ends.empty(64, 16, dtype=torch.bfloat16) for _ in rows]
    products = ends.count(lambda: RowKernels(rows, omegas).total([1.0] * 3))
    assert products.flops == 3 * 2 * 50**2 * 8 * 16
    assert products.factorisations == 0
    matrix = ends.empty(2, 40, 30, dtype=torch.float64)
    found = ends.count(lambda: torch.linalg.eigh(matrix.mT @ matrix))
    assert (found.calls, found.factorisations, found.flops) == (2, 1, 2 * (2 * 30 * 30 * 40 + 9 * 30**3))
    assert ends.count(lambda: torch.linalg.qr(matrix)).flops == 2 * (4 * 40 * 30**2 - 4 * 30**3 // 3)


def test_the_table_of_ends_is_of_this_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m bench.ends` writes it; steps that take long to count are counted then."""
    written = json.loads((ends.RESULTS / "ends.json").read_text())
    assert set(written) == set(ends.WEIGHTS)
    monkeypatch.setattr(ends, "_factors", lambda targets, n: None)
    for targets, steps in written.items():
        found = {step: asdict(each) for step, each in ends.steps(targets).items()}
        assert list(found) == list(steps)
        assert {step: found[step] for step in found if "KFAC" not in step} == {
            step: steps[step] for step in steps if "KFAC" not in step
        }
