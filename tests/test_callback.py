"""The posterior at the end of a Trainer's run is the one fitted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from laplace_lora_fast import InvalidBatchError, LaplaceLoRA, UnsupportedAdapterError
from laplace_lora_fast.callback import LaplaceCallback, answer_batch
from tests import tiny
from tests.oracle import assert_close

END = 2  # end of sequence

# Random labels: the best prior may be none at all.
ignore_grid_edges = pytest.mark.filterwarnings("ignore::laplace_lora_fast.errors.LaplaceWarning")

Example = dict[str, Any]


def prompts(n: int, seed: int) -> tiny.Batch:
    """Prompts without pads in `input_ids`, class indices in `labels`."""
    return tiny.batch(n, length=6, seed=seed, vocab=48)


def examples(data: tiny.Batch, end: bool = True) -> list[Example]:
    """Each prompt with its answer and an end of sequence behind it; labels are -100 on the prompt."""
    rows = []
    for ids, mask, label in zip(data["input_ids"], data["attention_mask"], data["labels"], strict=True):
        prompt = ids[mask.bool()].tolist()
        answer = [tiny.ANSWERS[label], *([END] if end else [])]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


def collate(rows: list[Example]) -> tiny.Batch:
    """Right padding, as TRL's language-modelling collator does it."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

    real = [{"m": [1] * len(row["input_ids"])} for row in rows]
    mask = torch.tensor([row["m"] + [0] * (length - len(row["m"])) for row in real])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


TRAIN, HELD_OUT = prompts(8, seed=1), prompts(5, seed=2)


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows: list[Example]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.rows[index]


def trainer(folder: Path, callback: LaplaceCallback, model=None, train=None, evaluate=None, **arguments: Any):
    """Two steps on the CPU, in fp32."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **arguments,
    )
    return transformers.Trainer(
        model=tiny.tiny_llama(torch.float32) if model is None else model,
        args=arguments,
        train_dataset=Rows(examples(TRAIN)) if train is None else train,
        eval_dataset=evaluate,
        data_collator=collate,
        callbacks=[callback],
    )


def by_hand(model: torch.nn.Module, method: str, **options: Any) -> LaplaceLoRA:
    """From prompts and class indices, each example once."""
    la = LaplaceLoRA(model, answer_token_ids=tiny.ANSWERS, **options)
    la.fit([TRAIN], progress=False)
    la.optimize_prior_precision(
        method, val_loader=[HELD_OUT] if method == "val_nll" else None, progress=False
    )
    return la


@ignore_grid_edges
@pytest.mark.parametrize("method", ["val_nll", "marglik"])
def test_token_level_labels_from_the_trainers_collator(tmp_path: Path, method: str) -> None:
    held_out = Rows(examples(HELD_OUT, end=False)) if method == "val_nll" else None
    callback = LaplaceCallback(
        eval_data=held_out, method=method, answer_token_ids=tiny.ANSWERS, kfac="expand"
    )
    run = trainer(tmp_path, callback)
    run.train()
    assert run.model.training
    expected = by_hand(run.model, method, kfac="expand")
    assert callback.laplace is not None
    assert callback.laplace.prior_precision == pytest.approx(expected.prior_precision, rel=1e-3)
    assert_close(callback.laplace.log_marginal_likelihood(1.0), expected.log_marginal_likelihood(1.0), 1e-5)

    base = tiny.tiny_llama(torch.float32).unload()
    model = peft.PeftModel.from_pretrained(base, tmp_path)
    loaded = LaplaceLoRA.load(tmp_path, model)
    assert loaded.prior_precision == callback.laplace.prior_precision
    assert_close(loaded.predict(HELD_OUT), callback.laplace.predict(HELD_OUT), 1e-6)


@ignore_grid_edges
def test_the_trainers_own_evaluation_set_and_loaders(tmp_path: Path) -> None:
    """Sequence classification: labels are class indices already."""

    def stack(rows: list[Example]) -> tiny.Batch:
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def rows(data: tiny.Batch) -> Rows:
        return Rows([{k: v[i] for k, v in data.items()} for i in range(len(data["labels"]))])

    model = tiny.tiny_llama_classifier(3, torch.float32)
    callback = LaplaceCallback(folder=tmp_path / "posterior", prior_structure="ab")
    run = trainer(tmp_path, callback, model, rows(TRAIN), rows(HELD_OUT), eval_strategy="steps", eval_steps=1)
    run.data_collator = stack
    run.train()
    assert callback.laplace is not None
    assert set(callback.laplace.prior_precision) == {"A", "B"}
    assert (tmp_path / "posterior" / "posterior.safetensors").is_file()
    assert (tmp_path / "posterior" / "adapter_config.json").is_file()

    again = LaplaceCallback(
        train_data=torch.utils.data.DataLoader(rows(TRAIN), batch_size=5, collate_fn=stack), method=None
    )
    run = trainer(tmp_path, again, model, rows(TRAIN))
    run.data_collator = stack
    run.train()
    assert again.laplace is not None
    assert again.laplace.prior_precision == 1.0
    expected = LaplaceLoRA(model).fit([TRAIN], progress=False).log_marginal_likelihood()
    assert_close(again.laplace.log_marginal_likelihood(), expected, 1e-5)


def test_columns_the_trainer_dropped_are_dropped_from_given_data() -> None:
    class Table(Rows):
        @property
        def column_names(self) -> list[str]:
            return list(self.rows[0])

        def select_columns(self, names: list[str]) -> Table:
            return Table([{name: row[name] for name in names} for row in self.rows])

    own = torch.utils.data.DataLoader(Table(examples(TRAIN)), collate_fn=collate)
    raw = Table([row | {"text": "..."} for row in examples(HELD_OUT)])
    callback = LaplaceCallback(answer_token_ids=tiny.ANSWERS)
    batches = callback._batches(raw, None, own, transformers.TrainingArguments(per_device_eval_batch_size=2))
    assert len(batches) == 3
    assert batches._loader.dataset.column_names == ["input_ids", "labels"]
    with pytest.raises(ValueError, match="has not evaluated"):
        callback._batches(None, None, own, transformers.TrainingArguments())


def test_what_could_not_work_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method"):
        LaplaceCallback(method="grid")
    with pytest.raises(ValueError, match="needs eval_data"):
        trainer(tmp_path, LaplaceCallback(answer_token_ids=tiny.ANSWERS)).train()
    with pytest.raises(ValueError, match="structure"):
        trainer(tmp_path, LaplaceCallback(method="marglik", structure="none")).train()
    plain = tiny.tiny_llama(torch.float32).unload()
    with pytest.raises(UnsupportedAdapterError):
        trainer(tmp_path, LaplaceCallback(method="marglik"), plain).train()
    with pytest.raises(TypeError, match="'structur'"):
        LaplaceCallback(method="marglik", structur="dual")
    others = {"answer_token_ids": [5, 6], "method": "marglik"}  # " A" was meant, say, and "A" was passed
    with pytest.raises(InvalidBatchError, match="none of answer_token_ids"):
        trainer(tmp_path, LaplaceCallback(**others)).train()
    with pytest.raises(InvalidBatchError, match="pass answer_token_ids"):
        trainer(tmp_path, LaplaceCallback(method="marglik")).train()
    rows = examples(HELD_OUT)
    rows[0]["labels"] = [-100] * len(rows[0]["labels"])
    with pytest.raises(InvalidBatchError, match="none of answer_token_ids"):
        trainer(tmp_path, LaplaceCallback(answer_token_ids=tiny.ANSWERS, eval_data=Rows(rows))).train()
    assert not list(tmp_path.rglob("*.safetensors"))


@ignore_grid_edges
def test_the_look_before_training_changes_nothing(tmp_path: Path) -> None:
    """Training draws, drops out and ends as without the callback."""

    def trained(*callbacks: LaplaceCallback) -> dict[str, Tensor]:
        torch.manual_seed(3)
        run = trainer(
            tmp_path, transformers.TrainerCallback(), tiny.tiny_llama(torch.float32, lora_dropout=0.3)
        )
        for callback in callbacks:
            run.add_callback(callback)
        run.train()
        return {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}

    loader = torch.utils.data.DataLoader(Rows(examples(TRAIN)), 4, shuffle=True, collate_fn=collate)
    looking = LaplaceCallback(answer_token_ids=tiny.ANSWERS, method="marglik", train_data=loader)
    plain, looked = trained(), trained(looking)
    assert all(torch.equal(plain[name], weight) for name, weight in looked.items())


class Once(torch.utils.data.IterableDataset):
    """Examples that are gone once they are read."""

    def __init__(self, rows: list[Example]) -> None:
        self.rows = iter(rows)

    def __iter__(self):
        return self.rows


def test_no_example_of_a_stream_is_lost_to_the_look(tmp_path: Path) -> None:
    stream = Once(examples(TRAIN))
    callback = LaplaceCallback(answer_token_ids=tiny.ANSWERS, method=None)
    run = trainer(tmp_path, callback, train=stream)
    own = run.get_train_dataloader()
    callback.on_train_begin(run.args, run.state, run.control, model=run.model, train_dataloader=own)
    assert len(list(stream)) == len(TRAIN["labels"])


class TestAnswerBatch:
    @pytest.mark.parametrize("end", [True, False])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_prompts_and_classes(self, end: bool, side: str) -> None:
        batch = collate(examples(TRAIN, end))
        if side == "left":
            for row in range(len(batch["labels"])):
                shift = int((batch["attention_mask"][row] == 0).sum())
                for name in batch:
                    batch[name][row] = batch[name][row].roll(shift)
        found = answer_batch(batch, tiny.ANSWERS)
        assert torch.equal(found["labels"], TRAIN["labels"])
        for row, (ids, mask) in enumerate(zip(TRAIN["input_ids"], TRAIN["attention_mask"], strict=True)):
            real = found["attention_mask"][row].bool()
            assert torch.equal(found["input_ids"][row][real], ids[mask.bool()])
        if side == "right":
            assert found["input_ids"].shape[1] == TRAIN["input_ids"].shape[1]

    def test_class_indices_pass(self) -> None:
        assert answer_batch(TRAIN, tiny.ANSWERS) is TRAIN

    def test_the_last_answer_counts(self) -> None:
        """A text of several labelled tokens, no mask."""
        a, b, _ = tiny.ANSWERS
        ids = torch.tensor([[9, a, 8, b, 9], [9, 8, a, 9, 9]])
        found = answer_batch({"input_ids": ids, "labels": ids, "text": ["x", "y"]}, tiny.ANSWERS)
        assert found["labels"].tolist() == [1, 0]
        assert found["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
        assert found["input_ids"].tolist() == [[9, a, 8], [9, 8, a]]
        assert found["text"] == ["x", "y"]

    def test_unusable_batches_are_named(self) -> None:
        a = tiny.ANSWERS[0]
        ids = torch.tensor([[9, a], [9, 8]])
        with pytest.raises(InvalidBatchError, match=r"example 1 .* none of answer_token_ids"):
            answer_batch({"input_ids": ids, "labels": ids}, tiny.ANSWERS)
        ids = torch.tensor([[9, a], [a, 8]])
        with pytest.raises(InvalidBatchError, match=r"example 1 .* no token before"):
            answer_batch({"input_ids": ids, "labels": ids}, tiny.ANSWERS)
        with pytest.raises(InvalidBatchError, match="packs"):
            answer_batch({"input_ids": ids, "labels": ids, "position_ids": ids}, tiny.ANSWERS)
