"""The README's code runs, on a tiny model in place of a real one."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from laplace_lora_fast.prompts import PromptRow, make_batches
from tests import words

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), flags=re.S)

# Random labels: the best prior may be none at all.
pytestmark = pytest.mark.filterwarnings("ignore::laplace_lora_fast.errors.LaplaceWarning")


def run(sign: str, names: dict[str, Any]) -> None:
    """Executes the one block that contains `sign`, with and into `names`."""
    (block,) = [block for block in BLOCKS if sign in block]
    exec(block, names)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the complete script leaves behind."""
    monkeypatch.chdir(tmp_path)
    words.save_model(tmp_path)
    words.write_rows(tmp_path / "train.jsonl", words.rows(12, choices=words.ANSWERS))
    names: dict[str, Any] = {}
    run('read_rows("train.jsonl")', names)
    return names


def test_the_script_and_the_features(names: dict[str, Any]) -> None:
    assert names["la"].predict(names["batch"]).shape == (1, 2)
    names |= {"val_loader": names["train_loader"], "test_loader": names["train_loader"]}
    run('la.save("posterior/")', names)
    assert names["probs"].shape == (1, 2)
    run('"val_nll", val_loader=val_loader', names)
    run("sample_adapters", names)
    assert names["cov"].shape == (1, 2, 2)


def test_the_callback(names: dict[str, Any]) -> None:
    tokenizer = names["tokenizer"]

    def example(row: PromptRow) -> dict[str, list[int]]:
        prompt, answer = tokenizer(row.prompt)["input_ids"], names["answer_ids"][row.label]
        return {"input_ids": [*prompt, answer], "labels": [-100] * len(prompt) + [answer]}

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        length = max(len(row["labels"]) for row in rows)

        def padded(name: str, value: int) -> Tensor:
            return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

        mask = torch.tensor([[1] * len(row["labels"]) + [0] * (length - len(row["labels"])) for row in rows])
        return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}

    examples = [example(row) for row in names["rows"]]
    args = transformers.TrainingArguments(
        output_dir="out", max_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    names |= {"train": examples, "held_out": examples[:5], "collate": collate, "args": args}
    for name, parameter in names["model"].named_parameters():
        parameter.requires_grad_("lora_" in name)
    run("LaplaceCallback(", names | {"Trainer": transformers.Trainer})
    assert Path("out/posterior.safetensors").is_file()


@pytest.mark.skipif(importlib.util.find_spec("laplace") is None, reason="laplace-torch is not installed")
def test_laplace_torch(names: dict[str, Any]) -> None:
    peft_model, answers, tokenizer = names["model"], names["answer_ids"], names["tokenizer"]
    for name, parameter in peft_model.named_parameters():
        parameter.requires_grad_("lora_" in name)

    class Answers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = peft_model

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            return self.model(**inputs).logits[:, -1, answers]

    loader = torch.utils.data.DataLoader(
        names["rows"], batch_size=4, collate_fn=lambda rows: make_batches(tokenizer, rows, len(rows))[0]
    )
    (block,) = [block for block in BLOCKS if "FastGGN" in block]
    lines = [line for line in block.splitlines() if line]
    given: dict[str, Any] = {"model": Answers()}
    for line in lines:
        exec(line, given)
        if line.startswith("la = "):
            given["la"].fit(loader)
            assert given["la"](next(iter(loader))).shape == (4, 2)
