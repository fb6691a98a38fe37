"""The posterior at the end of a Trainer's run is the one fitted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from laplace_lora_fast import (
    KFAC,
    Answers,
    Classes,
    Evidence,
    HeldOut,
    InvalidBatchError,
    LaplaceLoRA,
    LeaveOneOut,
    Tokens,
    UnsupportedAdapterError,
)
from laplace_lora_fast import Rows as RowStructure
from laplace_lora_fast.integrations.trainer import LaplaceCallback, answer_batch
from laplace_lora_fast.prior.tuning import Tuning
from tests import tiny
from tests.oracle import assert_close

END = 2  # end of sequence
ANSWERS = Answers(tiny.ANSWERS)

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


def by_hand(model: torch.nn.Module, tuning: Tuning, **options: Any) -> LaplaceLoRA:
    """From prompts and class indices, each example once."""
    la = LaplaceLoRA(model, ANSWERS, **options)
    la.fit([TRAIN], progress=False)
    la.optimize_prior_precision(tuning, progress=False)
    return la


EXPAND = KFAC(tokens="expand")
REFIT = RowStructure(refit=True)
# what the callback is given -> what is done by hand
WAYS = {
    "held_out": ({"eval_data": Rows(examples(HELD_OUT, end=False))}, HeldOut([HELD_OUT]), EXPAND),
    "a loader of one's own": (
        {"tuning": HeldOut([collate(examples(HELD_OUT))], per="side")},
        HeldOut([HELD_OUT], per="side"),
        EXPAND,
    ),
    "evidence": ({"tuning": Evidence(per="layer")}, Evidence(per="layer"), EXPAND),
    "evidence by name": ({"tuning": "evidence"}, Evidence(), EXPAND),
    "leave_one_out": ({"tuning": LeaveOneOut(grid=(0.1, 0.2))}, LeaveOneOut(grid=(0.1, 0.2)), REFIT),
}


@ignore_grid_edges
@pytest.mark.parametrize("way", WAYS)
def test_token_level_labels_from_the_trainers_collator(tmp_path: Path, way: str) -> None:
    given, tuning, structure = WAYS[way]
    callback = LaplaceCallback(ANSWERS, structure=structure, **given)
    run = trainer(tmp_path, callback)
    run.train()
    assert run.model.training
    expected = by_hand(run.model, tuning, structure=structure)
    assert callback.laplace is not None
    assert callback.laplace.prior_precision == pytest.approx(expected.prior_precision, rel=1e-3)
    assert callback.laplace.prior_precision != 1.0
    assert_close(callback.laplace.log_marginal_likelihood(1.0), expected.log_marginal_likelihood(1.0), 1e-5)

    base = tiny.tiny_llama(torch.float32).unload()
    model = peft.PeftModel.from_pretrained(base, tmp_path)
    loaded = LaplaceLoRA.load(tmp_path, model)
    assert loaded.prior_precision == callback.laplace.prior_precision
    assert_close(loaded.predict(HELD_OUT), callback.laplace.predict(HELD_OUT), 1e-6)


@ignore_grid_edges
def test_every_token_of_what_the_trainer_learns(tmp_path: Path) -> None:
    held_out = HeldOut([collate(examples(HELD_OUT))], grid=(1, 100, 1e4), n_samples=4)
    callback = LaplaceCallback(Tokens(samples=2), tuning=held_out)
    run = trainer(tmp_path, callback)
    run.train()
    expected = LaplaceLoRA(run.model, Tokens(samples=2)).fit([collate(examples(TRAIN))], progress=False)
    expected.optimize_prior_precision(held_out, progress=False)
    assert callback.laplace is not None
    assert callback.laplace.prior_precision == expected.prior_precision
    batch = collate(examples(HELD_OUT))
    for got, wanted in zip(
        callback.laplace.sequence_log_prob(batch), expected.sequence_log_prob(batch), strict=True
    ):
        assert_close(got, wanted, 1e-4)


@ignore_grid_edges
def test_the_trainers_own_evaluation_set_and_loaders(tmp_path: Path) -> None:
    """Sequence classification: labels are class indices already."""

    def stack(rows: list[Example]) -> tiny.Batch:
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def rows(data: tiny.Batch) -> Rows:
        return Rows([{k: v[i] for k, v in data.items()} for i in range(len(data["labels"]))])

    model = tiny.tiny_llama_classifier(3, torch.float32)
    callback = LaplaceCallback(Classes(), folder=tmp_path / "posterior")
    run = trainer(tmp_path, callback, model, rows(TRAIN), rows(HELD_OUT), eval_strategy="steps", eval_steps=1)
    run.data_collator = stack
    run.train()
    assert callback.laplace is not None
    expected = LaplaceLoRA(model, Classes()).fit([TRAIN], progress=False)
    expected.optimize_prior_precision(HeldOut([HELD_OUT]), progress=False)
    assert callback.laplace.prior_precision == pytest.approx(expected.prior_precision, rel=1e-3)
    assert (tmp_path / "posterior" / "posterior.safetensors").is_file()
    assert (tmp_path / "posterior" / "adapter_config.json").is_file()

    loader = torch.utils.data.DataLoader(rows(TRAIN), batch_size=5, collate_fn=stack)
    again = LaplaceCallback("classes", train_data=loader, tuning=None)
    run = trainer(tmp_path, again, model, rows(TRAIN))
    run.data_collator = stack
    run.train()
    assert again.laplace is not None
    assert again.laplace.prior_precision == 1.0
    expected = LaplaceLoRA(model, Classes()).fit([TRAIN], progress=False).log_marginal_likelihood()
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
    callback = LaplaceCallback(ANSWERS)
    batches = callback._batches(raw, None, own, transformers.TrainingArguments(per_device_eval_batch_size=2))
    assert len(batches) == 3
    assert batches._loader.dataset.column_names == ["input_ids", "labels"]
    with pytest.raises(ValueError, match="has not evaluated"):
        callback._batches(None, None, own, transformers.TrainingArguments())


def test_wrong_arguments_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"tuning must be one of .*'evidence'.* got 'grid'"):
        LaplaceCallback(ANSWERS, tuning="grid")
    with pytest.raises(TypeError, match="tuning must be one of"):
        LaplaceCallback(ANSWERS, tuning=3)
    with pytest.raises(TypeError, match="task must be one of"):
        LaplaceCallback(tiny.ANSWERS)
    with pytest.raises(TypeError, match="'structur'"):
        LaplaceCallback(ANSWERS, structur="rows")
    for tuning in (Evidence(), None):
        with pytest.raises(ValueError, match="eval_data is what tuning='held_out' looks at"):
            LaplaceCallback(ANSWERS, eval_data=[], tuning=tuning)


def test_what_could_not_work_is_refused_before_training(tmp_path: Path) -> None:
    def refused(task: Any, error: type[Exception], message: str, model: Any = None, **options: Any) -> None:
        with pytest.raises(error, match=message):
            trainer(tmp_path, LaplaceCallback(task, **options), model).train()

    evidence = {"tuning": Evidence()}
    refused(ANSWERS, ValueError, "needs eval_data")
    refused(ANSWERS, ValueError, "structure must be one of", structure="none", **evidence)
    for structure in ("auto", "kfac", RowStructure()):
        refused(
            ANSWERS, ValueError, r"needs structure=Rows\(refit", structure=structure, tuning=LeaveOneOut()
        )
    plain = tiny.tiny_llama(torch.float32).unload()
    refused(ANSWERS, UnsupportedAdapterError, "LoRA", plain, **evidence)
    others = Answers([5, 6])  # " A" was meant, say, and "A" was passed
    refused(others, InvalidBatchError, r"none of the answers \[5, 6\]", **evidence)
    refused(Classes(), InvalidBatchError, r"pass Answers\(token_ids\)", **evidence)
    rows = examples(HELD_OUT)
    rows[0]["labels"] = [-100] * len(rows[0]["labels"])
    refused(ANSWERS, InvalidBatchError, "example 0 of a batch has no labelled token", eval_data=Rows(rows))
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
    looking = LaplaceCallback(ANSWERS, tuning=Evidence(), train_data=loader)
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
    callback = LaplaceCallback(ANSWERS, tuning=None)
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

    def test_the_first_labelled_token_is_the_answer(self) -> None:
        """What follows is cut off, another answer among it: " yes, because there is no remainder"."""
        a, b, _ = tiny.ANSWERS
        ids = torch.tensor([[9, 8, b, 9, a], [9, b, 8, a, END]])
        labels = torch.tensor([[-100, -100, b, 9, a], [-100, -100, -100, a, END]])
        found = answer_batch({"input_ids": ids, "labels": labels, "text": ["x", "y"]}, tiny.ANSWERS)
        assert found["labels"].tolist() == [1, 0]
        assert found["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
        assert found["input_ids"].tolist() == [[9, 8, b], [9, b, 8]]
        assert found["text"] == ["x", "y"]

    def test_labels_of_pads_do_not_count(self) -> None:
        a, b, _ = tiny.ANSWERS
        ids = torch.tensor([[0, 9, a], [9, 8, b]])
        batch = {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
        labels = torch.tensor([[b, -100, a], [-100, -100, b]])
        assert answer_batch(batch | {"labels": labels}, tiny.ANSWERS)["labels"].tolist() == [0, 1]

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ([-100, 8, 5], r"example 1 .* token 8 as its first labelled one, which is none of the answers"),
            ([9, 8, 5], r"example 1 .* token 9 as its first .* labels must be -100 before the answer"),
            ([-100, -100, -100], "example 1 of a batch has no labelled token"),
            ([5, -100, -100], "example 1 of a batch has no token before its answer"),
        ],
    )
    def test_another_first_token_is_refused(self, labels: list[int], message: str) -> None:
        assert tiny.ANSWERS[0] == 5
        ids = torch.tensor([[9, 8, 5], [9, 8, 5]])
        batch = {"input_ids": ids, "labels": torch.tensor([[-100, -100, 5], labels])}
        with pytest.raises(InvalidBatchError, match=message):
            answer_batch(batch, tiny.ANSWERS)

    def test_packed_examples_are_refused(self) -> None:
        ids = torch.tensor([[9, 5], [9, 5]])
        with pytest.raises(InvalidBatchError, match="packs"):
            answer_batch({"input_ids": ids, "labels": ids, "position_ids": ids}, tiny.ANSWERS)
