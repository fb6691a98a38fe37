"""The callback with examples that are groups: options by a DataLoader of batches, pairs of TRL's RewardTrainer."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from laplace_lora_fast import Evidence, InvalidBatchError, LaplaceLoRA, Options, Preference
from laplace_lora_fast.data import option_batches_from_ids, preference_batches_from_ids
from laplace_lora_fast.integrations.trainer import LaplaceCallback, pair_batch
from tests import tiny
from tests.oracle import assert_close
from tests.tasks.test_options import examples


class Sequences(torch.utils.data.Dataset):
    """What the Trainer trains on: next tokens of the right options."""

    def __init__(self, rows) -> None:
        self.rows = [prompt + options[label] for prompt, options, label in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[index][:4], "labels": self.rows[index][:4]}


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    padded = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded, "attention_mask": (padded != 0).long(), "labels": padded}


def arguments(folder: Path) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )


def test_options(tmp_path: Path) -> None:
    rows = examples(5)
    batches = option_batches_from_ids(rows, 2)
    callback = LaplaceCallback(
        Options(), train_data=DataLoader(batches, batch_size=None), tuning=Evidence(), structure="kfac"
    )
    trainer = transformers.Trainer(
        tiny.tiny_llama(torch.float32),
        arguments(tmp_path),
        data_collator=collate,
        train_dataset=Sequences(rows),
        callbacks=[callback],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    assert callback.laplace is not None
    own = LaplaceLoRA(trainer.model, Options(), structure="kfac").fit(batches, progress=False)
    own.optimize_prior_precision(Evidence(), progress=False)
    assert callback.laplace.prior_precision == pytest.approx(own.prior_precision)
    assert_close(callback.laplace.predict(batches[0]), own.predict(batches[0]), 1e-6)
    assert (tmp_path / "posterior.safetensors").exists()


def test_pairs_of_a_collator() -> None:
    pairs = [([[3, 4, 5], [6, 7]], 0), ([[8, 9], [10, 11, 12]], 0)]
    flat = [chosen for (chosen, _), _ in pairs] + [rejected for (_, rejected), _ in pairs]
    width = max(map(len, flat))
    ids = torch.tensor([each + [0] * (width - len(each)) for each in flat])
    batch = pair_batch({"input_ids": ids, "attention_mask": (ids != 0).long(), "margin": torch.zeros(2)})
    (expected,) = preference_batches_from_ids(pairs, 2)
    la = LaplaceLoRA(tiny.tiny_llama_classifier(1), Preference()).fit([expected], progress=False)
    assert_close(la.predict(batch), la.predict(expected), 1e-9)
    assert batch["labels"].tolist() == [0, 0]
    assert "margin" not in batch
    assert pair_batch(expected) is expected
    with pytest.raises(InvalidBatchError, match="odd number"):
        pair_batch({"input_ids": ids[:3]})


def test_an_adapter_of_trls_reward_trainer(tmp_path: Path) -> None:
    """Trained, fitted, saved and read back; where TRL is installed."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from laplace_lora_fast.data import preference_batches
    from tests import words

    tokenizer = words.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "[END]", "pad_token": "[PAD]"})
    rows = [
        {"prompt": "the film", "chosen": f" good {w}", "rejected": f" bad {w} A"} for w in ("plot", "B", "C")
    ]
    model = tiny.tiny_llama_classifier(1, torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    callback = LaplaceCallback(Preference(), tuning=None)
    trainer = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(
            str(tmp_path), max_steps=2, report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=2
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    assert callback.laplace is not None
    batches = preference_batches(tokenizer, rows, 2)
    own = LaplaceLoRA(model, Preference()).fit(batches, progress=False)
    assert_close(callback.laplace.predict(batches[0]), own.predict(batches[0]), 1e-4)
    base = tiny.tiny_llama_classifier(1, torch.float32).unload()
    base.config.pad_token_id = tokenizer.pad_token_id
    base.config.eos_token_id = model.config.eos_token_id  # which TRL takes from the tokenizer
    again = LaplaceLoRA.load(tmp_path, peft.PeftModel.from_pretrained(base, str(tmp_path)))
    assert_close(again.predict(batches[0]), own.predict(batches[0]), 1e-4)
