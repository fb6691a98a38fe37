"""Files whose rows have choices of their own, or of several tokens: `Options`, by the same three commands."""

from __future__ import annotations

import json

import pytest
import torch

from laplace_lora_fast import Answers, LaplaceLoRA, Options, Rows
from laplace_lora_fast.data import option_batches
from laplace_lora_fast.data.lengths import Context
from laplace_lora_fast.data.prompts import load_causal_lm
from tests import words
from tests.cli.run import api, invoke, refused

CHOICES = (
    ["good", "bad"],
    ["good film", "bad"],
    ["A", "dull plot", "C"],
    ["fine", "a nice film", "poor", "B"],
)


def ragged(count, seed=0):
    """Rows of `words.rows`, each with two to four choices of one to three tokens, some prompts with a newline."""
    rows = words.rows(count, seed=seed)
    for number, row in enumerate(rows):
        row["choices"] = CHOICES[(number + seed) % 4]
        row["label"] = number % len(row["choices"])
        row["prompt"] += "\n" * (number % 2)
    return rows


@pytest.fixture(scope="module")
def ragged_files(files):
    folder, common = files
    for name, count in (("ragged", 8), ("ragged_val", 6), ("ragged_test", 7)):
        words.write_rows(folder / f"{name}.jsonl", ragged(count, seed=count))
    return folder, common


def fit(files, out, *options, data="ragged"):
    folder, common = files
    result = invoke("fit", *common, "--data", folder / f"{data}.jsonl", "--out", out, *options)
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.filterwarnings("default::laplace_lora_fast.errors.LaplaceWarning")
@pytest.mark.parametrize("score", [None, "sum", "mean"])
def test_fit_does_what_the_api_does(ragged_files, tmp_path, score):
    folder, _ = ragged_files
    result = fit(ragged_files, tmp_path, *([] if score is None else ["--score", score]))
    assert "chosen by evidence" in result.output
    model, _, _ = api(folder)
    _, tokenizer = load_causal_lm(str(folder / "base"))
    task = Options(score or "sum")
    assert repr(task) in result.output
    expected = LaplaceLoRA(model, task, structure=Rows(refit=True))
    expected.fit(option_batches(tokenizer, ragged(8, seed=8), 4), progress=False)
    expected.optimize_prior_precision(progress=False)
    got = LaplaceLoRA.load(tmp_path, model)
    assert got.task == task
    assert got.prior_precision == expected.prior_precision
    (batch,) = option_batches(tokenizer, ragged(3, seed=1), 3)
    torch.testing.assert_close(got.predict(batch), expected.predict(batch))


@pytest.mark.filterwarnings("default::laplace_lora_fast.errors.LaplaceWarning")
def test_all_commands(ragged_files, tmp_path):
    folder, common = ragged_files
    fit(ragged_files, tmp_path / "post", "--val", folder / "ragged_val.jsonl")
    arguments = ["--posterior", tmp_path / "post", "--data", folder / "ragged_test.jsonl"]
    scores, plots = tmp_path / "scores.json", tmp_path / "plots"
    result = invoke("evaluate", *common, *arguments, "--json", scores, "--plots", plots)
    assert result.exit_code == 0, result.output
    result = invoke("predict", *common, *arguments, "--out", tmp_path / "probs.jsonl")
    assert result.exit_code == 0, result.output
    written = [json.loads(line) for line in (tmp_path / "probs.jsonl").read_text().splitlines()]
    rows = ragged(7, seed=7)
    model, _, _ = api(folder)
    _, tokenizer = load_causal_lm(str(folder / "base"))
    la, nll = LaplaceLoRA.load(tmp_path / "post", model), 0.0
    for line, row in zip(written, rows, strict=True):
        assert (line["prompt"], line["choices"]) == (row["prompt"], row["choices"])
        (batch,) = option_batches(tokenizer, [row], 1)
        expected = la.predict(batch)[0]
        nll -= float(expected[row["label"]].log()) / 7
        torch.testing.assert_close(torch.tensor(line["probs"]), expected, rtol=1e-4, atol=1e-5)
    assert json.loads(scores.read_text())["Laplace"]["nll"] == pytest.approx(nll, rel=1e-4)


def test_options_and_answers_give_the_same_numbers(files, tmp_path):
    """Choices in another order make the rows those of `Options`; the numbers are the same, in that order."""
    folder, common = files
    rows = words.rows(6, seed=5)
    turned = [rows[0] | {"choices": rows[0]["choices"][::-1], "label": 1 - rows[0]["label"]}, *rows[1:]]
    words.write_rows(folder / "plain.jsonl", rows)
    words.write_rows(folder / "turned.jsonl", turned)
    found = []
    for name, task in (("plain", Answers), ("turned", Options)):
        fit(files, tmp_path / name, "--prior", "1", data=name)
        assert isinstance(LaplaceLoRA.load(tmp_path / name, api(folder)[0]).task, task)
        arguments = ["--posterior", tmp_path / name, "--data", folder / f"{name}.jsonl"]
        out = tmp_path / f"{name}.jsonl"
        assert invoke("predict", *common, *arguments, "--out", out).exit_code == 0
        found.append([json.loads(line)["probs"] for line in out.read_text().splitlines()])
    found[1][0].reverse()
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}Sentiment:\n"]
)
def test_prompts_that_end_in_a_newline_are_answered_by_a_token(files, tmp_path, template):
    """Also a chat template's: no sequence for each choice where one token says it."""
    folder, common = files
    rows = [row | {"prompt": row["prompt"] + "\n"} for row in words.rows(6, seed=5)]
    config = folder / "base" / "tokenizer_config.json"
    before = config.read_text()
    if template is not None:
        rows = [row | {"prompt": [{"role": "user", "content": row["prompt"].strip()}]} for row in rows]
        config.write_text(json.dumps(json.loads(before) | {"chat_template": template}))
    words.write_rows(folder / "lines.jsonl", rows)
    try:
        fit(files, tmp_path / "post", "--prior", "1", data="lines")
        out = tmp_path / "probs.jsonl"
        arguments = ["--posterior", tmp_path / "post", "--data", folder / "lines.jsonl", "--out", out]
        assert invoke("predict", *common, *arguments).exit_code == 0
    finally:
        config.write_text(before)
    la = LaplaceLoRA.load(tmp_path / "post", api(folder)[0])
    assert isinstance(la.task, Answers)
    assert len(out.read_text().splitlines()) == 6


def test_the_posterior_decides(ragged_files, posterior, tmp_path):
    folder, common = ragged_files
    fit(ragged_files, tmp_path / "post", "--prior", "1")
    arguments = [*common, "--posterior", tmp_path / "post", "--data", folder / "test.jsonl"]
    assert invoke("evaluate", *arguments).exit_code == 0
    arguments = [*common, "--posterior", posterior, "--data", folder / "ragged_test.jsonl"]
    complaint = refused("evaluate", *arguments)
    assert "ragged_test.jsonl: row 2 has other 'choices' than the first" in complaint


def test_chats(ragged_files, tmp_path):
    folder, common = ragged_files
    rows = ragged(4)
    rows[1]["prompt"] = [{"role": "user", "content": "the film"}]
    data = words.write_rows(tmp_path / "chat.jsonl", rows)
    arguments = ["--data", data, "--prior", "1", "--out", tmp_path / "post"]
    assert "chat.jsonl: row 2: the tokenizer's chat template" in refused("fit", *common, *arguments)
    config = folder / "base" / "tokenizer_config.json"
    before = config.read_text()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}Sentiment:"
    config.write_text(json.dumps(json.loads(before) | {"chat_template": template}))
    try:
        assert invoke("fit", *common, *arguments).exit_code == 0
        arguments = ["--data", data, "--posterior", tmp_path / "post", "--out", tmp_path / "probs.jsonl"]
        assert invoke("predict", *common, *arguments).exit_code == 0
    finally:
        config.write_text(before)
    written = [json.loads(line) for line in (tmp_path / "probs.jsonl").read_text().splitlines()]
    assert written[1]["prompt"] == rows[1]["prompt"]
    _, tokenizer = load_causal_lm(str(folder / "base"))
    la = LaplaceLoRA.load(tmp_path / "post", api(folder)[0])
    (batch,) = option_batches(tokenizer, [rows[1] | {"prompt": "the film Sentiment:"}], 1)
    expected = la.predict(batch)[0].tolist()
    assert written[1]["probs"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data train.jsonl --score mean", "--score is for rows with different choices"),
        ("--data ragged.jsonl --score max", "--score must be sum or mean, got 'max'"),
        ("--data same.jsonl", "same.jsonl: row 2: options 'what' and 'why' have the same tokens"),
        (
            "--data long.jsonl",
            "long.jsonl: row 3 has 2051 tokens, the model's context is 2048: shorten it, or",
        ),
        (
            "--data long_answers.jsonl",
            "long_answers.jsonl: row 1 has 2049 tokens, the model's context is 2048",
        ),
        (
            "--data long_option.jsonl --truncate",
            "row 1 has an option of 2048 tokens, the model's context is 2048",
        ),
    ],
)
def test_what_is_refused(ragged_files, tmp_path, monkeypatch, no_work, options, message):
    folder, common = ragged_files
    monkeypatch.chdir(folder)
    rows = ragged(3)
    long = "good " * 2049
    words.write_rows(folder / "same.jsonl", [rows[0], rows[1] | {"choices": ["what", "why"]}])
    words.write_rows(folder / "long.jsonl", [*rows[:2], rows[2] | {"prompt": long}])
    words.write_rows(folder / "long_answers.jsonl", [rows[0] | {"prompt": long.strip()}])
    words.write_rows(folder / "long_option.jsonl", [rows[0] | {"choices": [long[:-6], "bad"], "label": 0}])
    assert message in refused("fit", *common, "--prior", "1", "--out", tmp_path / "out", *options.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("default::laplace_lora_fast.errors.LaplaceWarning")
@pytest.mark.parametrize("data", ["ragged", "train"])
def test_prompts_are_truncated_from_the_left(ragged_files, tmp_path, data):
    """What is cut off has no influence; what is left, all of the context, has."""
    _, common = ragged_files
    fit(ragged_files, tmp_path / "post", "--prior", "1", data=data)
    row = ragged(3)[2] if data == "ragged" else words.rows(1)[0]
    longest = 2 if data == "ragged" else 0
    end = " ".join(words.WORDS[i % len(words.WORDS)] for i in range(2048 - longest))
    found = []
    for prompt, options in ((end, []), ("film bad " + end, ["--truncate"])):
        path = words.write_rows(tmp_path / "rows.jsonl", [row | {"prompt": prompt}])
        arguments = ["--data", path, "--posterior", tmp_path / "post", "--out", tmp_path / "probs.jsonl"]
        result = invoke("predict", *common, *arguments, *options)
        assert result.exit_code == 0, result.output
        found.append(json.loads((tmp_path / "probs.jsonl").read_text())["probs"])
        said = f"--truncate cut 1 of 1 prompts of {path} to the model's 2048 tokens"
        assert (said in result.stderr.replace("\n", "")) == bool(options)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_token_that_begins_every_sequence_stays():
    for first, left in ((9, [9, 4, 5]), (8, [3, 4, 5])):
        context = Context(length=5, truncate=True, begin=9)
        assert context.fitting([first, 2, 3, 4, 5], [[6], [7, 7]], str) == left
