"""The table's script on a tiny model: cells are resumable, the differences are those of the rows."""

from __future__ import annotations

import json
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bench.table import draw, methods, run, subjects, train
from laplace_lora_fast import Classes
from laplace_lora_fast.baselines import Temperature
from laplace_lora_fast.errors import NumericalError
from tests import tiny

Row = namedtuple("Row", "ids label")
pytestmark = pytest.mark.filterwarnings("ignore::laplace_lora_fast.errors.LaplaceWarning")


def rows(n: int, seed: int) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, tiny.VOCAB, (n, 5), generator=generator)
    return [Row(tuple(row), int(row[0] > tiny.VOCAB // 2)) for row in ids.tolist()]


def load():
    base = tiny.tiny_bert_classifier(2, dtype=torch.float32, layers=1).unload()

    def batches(some, size):
        pieces = [some[start : start + size] for start in range(0, len(some), size)]
        return [
            {
                "input_ids": torch.tensor([row.ids for row in piece]),
                "attention_mask": torch.ones(len(piece), 5, dtype=torch.long),
                "labels": torch.tensor([row.label for row in piece]),
            }
            for piece in pieces
        ]

    return base, batches, Classes()


SUBJECT = subjects.Subject(
    "tiny",
    load,
    {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    {"long": 3},
    learning_rate=1e-2,
)


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(run, "OUT", tmp_path / "table")

    def data(seed: int) -> subjects.Data:
        return subjects.Data(rows(16, seed), rows(12, 50), {"one": rows(20, 51), "two": rows(20, 52)})

    for module in (train, methods):
        monkeypatch.setattr(module, "rows_of_seed", data)
    return tmp_path / "table"


GROUPS = ["MAP", "temperature", "cross-fitted temperature", "rows", "refit"]


def test_a_cell_is_filled_once_and_drawn(small, monkeypatch):
    for seed in (0, 1):
        for name in ("main", *(f"fold{k}" for k in range(train.FOLDS))):
            train.ensure(SUBJECT, seed, name, 3)
        run.fill(methods.Cell(SUBJECT, seed, 3), "long", GROUPS)
    cell = json.loads((small / "tiny.long.0.json").read_text())
    assert {"MAP", "temperature, held-out", "exact rows, cross-fitted", "refit, leave-one-out"} <= set(
        cell["methods"]
    )
    monkeypatch.setattr(methods.Cell, "model", lambda *_: pytest.fail("computed again"))
    run.fill(methods.Cell(SUBJECT, 0, 3), "long", GROUPS)
    monkeypatch.undo()

    cells = [json.loads(file.read_text()) for file in sorted(small.glob("*.json"))]
    model = _trained(small)
    with torch.no_grad():
        logits = model(**{k: v for k, v in load()[1](rows(20, 51), 20)[0].items() if k != "labels"}).logits
    labels = torch.tensor([row.label for row in rows(20, 51)])
    found = draw.losses(cells[0], "MAP", "one")
    torch.testing.assert_close(
        found.float(), nn.functional.cross_entropy(logits, labels, reduction="none"), rtol=1e-3, atol=1e-3
    )
    apart = draw.difference(cells, "exact rows, held-out", "MAP", "one")
    losses = [
        draw.losses(each, "exact rows, held-out", "one") - draw.losses(each, "MAP", "one") for each in cells
    ]
    assert apart.value == pytest.approx(float(torch.stack(losses).mean()))
    assert apart.low <= apart.value <= apart.high
    draw.draw(small)
    text = (small.parent / "table.md").read_text()
    assert "## tiny, long: 3 epochs" in text
    assert f"{float(torch.stack([draw.losses(c, 'MAP', 'one').mean() for c in cells]).mean()):.3f}" in text
    assert (small.parent / "table.png").exists()


def _trained(small) -> nn.Module:
    model, _, _ = SUBJECT.adapted(0)
    state = load_file(small.parent / "cache" / "tiny" / "0" / "main" / "3.safetensors")
    for name, value in state.items():
        model.get_parameter(name).data.copy_(value)
    return model.eval()


def test_what_a_regime_has_not_is_said(small):
    train.ensure(SUBJECT, 0, "main", 3)
    run.fill(methods.Cell(SUBJECT, 0, 1), "long", ["checkpoints"])
    (facts,) = json.loads((small / "tiny.long.0.json").read_text())["methods"].values()
    assert "at least one model" in facts["left_out"]


def test_where_no_temperature_is_best_it_is_infinite(small, monkeypatch):
    train.ensure(SUBJECT, 0, "main", 3)

    def none_is_best(*_):
        raise NumericalError("temperature scaling has no optimum")

    monkeypatch.setattr(Temperature, "fit", none_is_best)
    found = methods.GROUPS["temperature"](methods.Cell(SUBJECT, 0, 3))["temperature, held-out"]
    assert found["temperature"] == "infinite"
    assert set(found["log_odds"]["one"]) == {0.0}
