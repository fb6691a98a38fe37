"""Files of texts, {"prompt", "completion"}: `Tokens`, from fit to generate."""

from __future__ import annotations

import json

import pytest
import torch

from laplace_lora_fast import HeldOut, LaplaceLoRA, Tokens
from laplace_lora_fast.data import text_batches
from laplace_lora_fast.data.prompts import load_causal_lm
from laplace_lora_fast.data.texts import read_texts
from laplace_lora_fast.errors import InvalidBatchError
from tests import words
from tests.cli.run import api, invoke, refused


def texts(count: int, seed: int) -> list[dict[str, str]]:
    """Prompts of `words.rows`, followed by one to three words."""
    rows = words.rows(count, seed=seed)
    return [
        {"prompt": row["prompt"], "completion": " ".join(words.WORDS[: 1 + n % 3])}
        for n, row in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def text_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    base, adapter = words.save_model(folder)
    with_end = words.tokenizer()
    with_end.eos_token = "[UNK]"
    with_end.save_pretrained(base)
    words.write_rows(folder / "train.jsonl", words.rows(4))  # which `api` reads answers off
    for name, count in (("texts", 6), ("texts_val", 4)):
        words.write_rows(folder / f"{name}.jsonl", texts(count, seed=count))
    return folder, ["--model", str(base), "--adapter", str(adapter), "--batch-size", "4"]


@pytest.mark.filterwarnings("default::laplace_lora_fast.errors.LaplaceWarning")
def test_fit_does_what_the_api_does_and_generate_reads_it(text_files, tmp_path):
    folder, common = text_files
    files = ["--data", folder / "texts.jsonl", "--val", folder / "texts_val.jsonl", "--out", tmp_path]
    result = invoke("fit", *common, *files, "--samples", "2", "--grid", "1", "100")
    assert result.exit_code == 0, result.output
    assert "chosen by held_out" in result.output
    assert "Tokens(samples=2" in result.output
    assert "marginal likelihood" not in result.output
    model, _, _ = api(folder)
    _, tokenizer = load_causal_lm(str(folder / "base"))
    train, val = (
        text_batches(tokenizer, read_texts(folder / f"{name}.jsonl"), 4) for name in ("texts", "texts_val")
    )
    expected = LaplaceLoRA(model, Tokens(samples=2)).fit(train, progress=False)
    grid = [100 ** (step / 20) for step in range(21)]
    expected.optimize_prior_precision(HeldOut(val, grid=grid), progress=False)
    found = LaplaceLoRA.load(tmp_path, model)
    assert found.prior_precision == pytest.approx(expected.prior_precision)
    for one, other in zip(found.sequence_log_prob(val[0]), expected.sequence_log_prob(val[0]), strict=True):
        torch.testing.assert_close(one, other)
    answers = tmp_path / "answers.jsonl"
    options = ["--prompt", "good film", "--samples", "2", "--max-new-tokens", "3", "--out", answers]
    result = invoke("generate", *common, "--posterior", tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert json.loads(answers.read_text())["prompt"] == "good film"
    complaint = refused("evaluate", *common, "--posterior", tmp_path, "--data", folder / "train.jsonl")
    assert "says nothing of choices" in complaint


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "of texts there is no evidence"),
        (["--prior", "evidence"], "of texts there is no evidence"),
        (["--prior", "10", "--score", "mean"], "--score is for rows with choices"),
        (["--val", "train.jsonl"], "field 'completion'"),
    ],
)
def test_what_does_not_go_with_texts(text_files, tmp_path, no_work, options, complaint):
    folder, common = text_files
    options = [str(folder / option) if option.endswith(".jsonl") else option for option in options]
    assert complaint in refused("fit", *common, "--data", folder / "texts.jsonl", "--out", tmp_path, *options)


def test_samples_are_for_texts(text_files, tmp_path, no_work):
    folder, common = text_files
    command = ["fit", *common, "--data", folder / "train.jsonl", "--out", tmp_path, "--samples", "2"]
    assert "--samples is for texts" in refused(*command)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "", "completion": "x"}', "line 1: field 'prompt' must be a non-empty string"),
        ('{"prompt": "x", "completion": " "}', "line 1: field 'completion' must be a non-empty"),
        ("[1]", "line 1: field 'prompt'"),
    ],
)
def test_wrong_lines(tmp_path, line, complaint):
    file = tmp_path / "texts.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(InvalidBatchError, match=complaint):
        read_texts(file)
