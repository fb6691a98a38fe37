"""`laplace-lora select` does what the Python functions do, in the rows' order."""

from __future__ import annotations

import json

import pytest

from laplace_lora_fast import LaplaceLoRA
from laplace_lora_fast.evaluation.selective import abstention_curve, conformal_sets
from tests import words
from tests.cli.run import api, invoke, refused


def test_it_does_what_the_api_does(files, posterior, tmp_path):
    folder, common = files
    paths = {"--data": folder / "test.jsonl", "--calibration": folder / "train.jsonl"}
    paths |= {"--json": tmp_path / "figures.json", "--out": tmp_path / "rows.jsonl", "--posterior": posterior}
    options = [part for pair in paths.items() for part in pair]
    result = invoke(
        "select", *common, *options, "--coverage", "0.5", "--alpha", "0.25", "--method", "adaptive"
    )
    assert result.exit_code == 0, result.output
    model, _, batches = api(folder)
    la = LaplaceLoRA.load(posterior, model)
    test, held = (la.predictions(batches(name), progress=False) for name in ("test", "train"))
    curve, sets = abstention_curve(test), conformal_sets(held, test, 0.25, "adaptive")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == ["MAP", "Laplace"]
    assert figures["Laplace"] == pytest.approx(
        {
            "risk of all": curve.risk_at(1.0),
            "risk at 0.5": curve.risk_at(0.5),
            "area under risk": curve.area,
            "sets at 0.75: coverage": sets.coverage,
            "classes in a set": float(sets.size.double().mean()),
        }
    )
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    rows = words.rows(10, seed=10)
    assert [line["prompt"] for line in written] == [row["prompt"] for row in rows]
    assert sum(len(line["set"]) for line in written) == int(sets.size.sum())
    answered = [max(line["probs"]) for line in written if line["answered"]]
    left = [max(line["probs"]) for line in written if not line["answered"]]
    assert len(answered) >= 5
    assert min(answered) > max(left)


def test_sets_are_optional(files, posterior, tmp_path):
    folder, common = files
    arguments = ["--posterior", posterior, "--data", folder / "test.jsonl", "--out", tmp_path / "rows.jsonl"]
    assert invoke("select", *common, *arguments).exit_code == 0
    assert "set" not in json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--alpha 0.2", "--alpha is for conformal sets: pass --calibration too"),
        ("--method adaptive", "--method is for conformal sets"),
        ("--coverage 0", "--coverage must lie in (0, 1], got 0"),
        ("--calibration train.jsonl --alpha 1", "--alpha must lie in (0, 1), got 1"),
        ("--calibration train.jsonl --method split", "--method must be threshold or adaptive, got 'split'"),
        ("--out test.jsonl", "--out test.jsonl would overwrite what is read"),
        ("--calibration train.jsonl --json train.jsonl", "--json train.jsonl would overwrite what is read"),
    ],
)
def test_what_is_refused(files, posterior, monkeypatch, no_work, options, message):
    folder, common = files
    monkeypatch.chdir(folder)
    arguments = ["--posterior", posterior, "--data", "test.jsonl"]
    assert message in refused("select", *common, *arguments, *options.split())
