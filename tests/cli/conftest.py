from __future__ import annotations

import logging

import pytest

from laplace_lora_fast import LaplaceLoRA
from tests import words
from tests.cli.run import invoke


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Arguments that name a model, an adapter and data, and the folder they lie in."""
    folder = tmp_path_factory.mktemp("cli")
    base, adapter = words.save_model(folder)
    for name, count in (("train", 12), ("val", 8), ("test", 10)):
        words.write_rows(folder / f"{name}.jsonl", words.rows(count, seed=count))
    return folder, ["--model", str(base), "--adapter", str(adapter), "--batch-size", "4"]


@pytest.fixture(scope="module")
def posterior(files):
    """Folder of a posterior fitted by the command."""
    folder, common = files
    result = invoke(
        "fit", *common, "--data", folder / "train.jsonl", "--out", folder / "post", "--prior", "evidence"
    )
    assert result.exit_code == 0, result.output
    return folder / "post"


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def no_work(monkeypatch):
    """Fails where a fit or a prediction begins."""

    def work(*args, **kwargs):
        raise AssertionError("the work began")

    for name in ("fit", "predictions"):
        monkeypatch.setattr(LaplaceLoRA, name, work)
