"""lm-evaluation-harness scores its documents with our model: the harness itself, where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from laplace_lora_fast import Answers, LaplaceLoRA, Options
from laplace_lora_fast.data import option_batches
from laplace_lora_fast.data.prompts import PromptRow, answer_token_ids, make_batches
from tests import words
from tests.cli.run import api
from tests.cli.test_options import ragged

TASK = """
task: small
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: " "
metric_list:
  - metric: acc
"""


def saved(folder: Path, task: str, rows: list) -> LaplaceLoRA:
    """A model, an adapter and a posterior in files."""
    words.save_model(folder)
    with_end = words.tokenizer()
    with_end.eos_token = "[UNK]"  # which the harness needs
    with_end.save_pretrained(folder / "base")
    words.write_rows(folder / "train.jsonl", rows)
    tokenizer = words.tokenizer()
    model, _, _ = api(folder) if task == "answers" else (*_model(folder), None)
    if task == "answers":
        listed = [PromptRow(row["prompt"], tuple(row["choices"]), row["label"]) for row in rows]
        la = LaplaceLoRA(model, Answers(answer_token_ids(tokenizer, listed)))
        la.fit(make_batches(tokenizer, listed, 4), progress=False)
    else:
        la = LaplaceLoRA(model, Options()).fit(option_batches(tokenizer, rows, 4), progress=False)
    la.save(folder / "posterior")
    return la


def _model(folder: Path):
    import peft

    from laplace_lora_fast.data.prompts import load_causal_lm

    base, tokenizer = load_causal_lm(str(folder / "base"))
    return peft.PeftModel.from_pretrained(base, str(folder / "adapter")), tokenizer


@pytest.mark.parametrize("task", ["options", "answers"])
def test_the_harness_runs_a_task_of_its_own(task: str, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("datasets")
    import lm_eval.tasks

    from laplace_lora_fast.integrations.lm_eval import LaplaceLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        row | {"prompt": row["prompt"].strip()} for row in (ragged(8) if task == "options" else words.rows(8))
    ]
    la = saved(tmp_path, task, rows)
    (tmp_path / "small.yaml").write_text(TASK.format(path=tmp_path / "train.jsonl"))
    model = LaplaceLM(
        pretrained=str(tmp_path / "base"),
        peft=str(tmp_path / "adapter"),
        posterior=str(tmp_path / "posterior"),
        device="cpu",
        batch_size=4,
    )
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    result = lm_eval.simple_evaluate(
        model, tasks=["small"], task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    right = 0
    for sample in result["samples"]["small"]:
        row = sample["doc"]
        if task == "options":
            (batch,) = option_batches(words.tokenizer(), [row], 1)
        else:
            (batch,) = make_batches(
                words.tokenizer(), [PromptRow(row["prompt"], tuple(row["choices"]), 0)], 1
            )
        expected = la.predict(batch)[0]
        found = torch.tensor([float(resp[0][0]) for resp in sample["resps"]]).exp()
        torch.testing.assert_close(found, expected[: len(found)], rtol=1e-4, atol=1e-6)
        right += int(expected.argmax()) == row["label"]
    assert result["results"]["small"]["acc,none"] == pytest.approx(right / 8)
    with pytest.raises(ValueError, match="generates nothing"):
        model.generate_until([])
    with pytest.raises(ValueError, match="not running text"):
        model.loglikelihood_rolling([])


def test_the_command_knows_the_model(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("datasets")
    import os
    import subprocess
    import sys

    saved(tmp_path, "options", ragged(4))
    (tmp_path / "small.yaml").write_text(TASK.format(path=tmp_path / "train.jsonl"))
    arguments = ["--model", "laplace", "--tasks", "small", "--include_path", tmp_path, "--device", "cpu"]
    files = ",".join(
        f"{k}={tmp_path / v}" for k, v in (("pretrained", "base"), ("peft", "adapter"), ("posterior",) * 2)
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "laplace_lora_fast.integrations.lm_eval",
            *arguments,
            "--model_args",
            files,
            "--output_path",
            tmp_path / "out",
        ],
        env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "out").rglob("results*.json")
    assert "acc,none" in json.loads(written.read_text())["results"]["small"]
