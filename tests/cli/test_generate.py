from __future__ import annotations

import json

import pytest

from laplace_lora_fast import LaplaceLoRA
from laplace_lora_fast.data.prompts import load_causal_lm
from tests.cli.run import api, invoke, refused

OPTIONS = ["--samples", "3", "--max-new-tokens", "4"]


def test_answers_are_those_of_the_api(files, posterior, tmp_path):
    folder, common = files
    out, page = tmp_path / "answers.jsonl", tmp_path / "answers.html"
    prompts = ["--prompt", "good film", "--prompt", "a dull plot"]
    result = invoke(
        "generate", *common, "--posterior", posterior, *prompts, *OPTIONS, "--out", out, "--html", page
    )
    assert result.exit_code == 0, result.output
    la = LaplaceLoRA.load(posterior, api(folder)[0])
    _, tokenizer = load_causal_lm(str(folder / "base"))
    expected = la.generate(["good film", "a dull plot"], tokenizer, n_samples=3, max_new_tokens=4)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["answer"] for line in lines] == expected.texts
    assert [line["prompt"] for line in lines] == ["good film", "a dull plot"]
    for row, line in enumerate(lines):
        assert line["epistemic"] == pytest.approx(float(expected.sequence().epistemic[row]), rel=1e-5)
        got = [token["epkl"] for token in line["tokens"]]
        assert got == pytest.approx(expected.uncertainty.epkl[row][expected.mask[row]].tolist(), abs=1e-5)
    assert page.read_text(encoding="utf-8").count("<span") == int(expected.mask.sum())
    assert result.output.count("nats a token") == 2


def test_tokens_above_the_bound_are_marked(files, posterior):
    _, common = files
    command = ["generate", *common, "--posterior", posterior, "--prompt", "good film", *OPTIONS]
    assert "⟦" not in invoke(*command, "--above", "100").output
    output = invoke(*command, "--above", "0", "--measure", "total").output
    assert "good film⟦ C⟧⟦ C⟧" in output
    assert output.count("⟦") == 2, "two tokens have no text"


def test_prompts_of_a_file_and_drawn_answers(files, posterior, tmp_path):
    _, common = files
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "good film"}\n{"prompt": "a dull plot", "choices": []}\n', encoding="utf-8")
    drawn = ["--temperature", "0.9", "--top-p", "0.9", "--seed", "3"]
    result = invoke("generate", *common, "--posterior", posterior, "--data", data, *OPTIONS, *drawn)
    assert result.exit_code == 0, result.output
    assert result.output.count("nats a token") == 2


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "by --prompt, or a file"),
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "x", "--measure", "fear"], "--measure must be"),
        (["--prompt", "x", "--temperature", "0"], "--temperature must be positive"),
        (["--prompt", "x", "--top-p", "0.5"], "--top-p is for drawn tokens"),
        (["--prompt", "x", "--temperature", "1", "--top-p", "2"], "--top-p must lie in"),
        (["--prompt", "x", "--max-new-tokens", "100000"], "more than the model's context"),
    ],
)
def test_wrong_options(files, posterior, options, complaint):
    _, common = files
    assert complaint in refused("generate", *common, "--posterior", posterior, *options)


def test_what_is_read_is_not_overwritten(files, posterior, tmp_path):
    _, common = files
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "good film"}\n', encoding="utf-8")
    command = ["generate", *common, "--posterior", posterior, "--data", data, "--out", data]
    assert "would overwrite what is read" in refused(*command)


@pytest.mark.parametrize("line", ['{"choices": []}', '{"prompt": ""}', "[1]", "nothing"])
def test_wrong_lines(files, posterior, tmp_path, line):
    _, common = files
    data = tmp_path / "prompts.jsonl"
    data.write_text(line + "\n", encoding="utf-8")
    complaint = refused("generate", *common, "--posterior", posterior, "--data", data)
    assert "prompts.jsonl, line 1" in complaint.replace("\n", "")
