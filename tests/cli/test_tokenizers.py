"""A posterior belongs to the tokenizer that made its batches; damaged weights are one line."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.cli.run import invoke, refused


@pytest.fixture
def place(files, posterior, tmp_path):
    """A copy of the model's folder, of the adapter's, and the arguments of `predict` with them."""
    folder, common = files
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for copy, argument in ((base, "--model"), (adapter, "--adapter")):
        shutil.copytree(common[common.index(argument) + 1], copy)
    rest = ["--data", folder / "test.jsonl", "--posterior", posterior, "--out", tmp_path / "out.jsonl"]
    return base, adapter, ["--model", base, "--adapter", adapter, *rest]


def swap_tokens(base):
    path = base / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[5:7]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(content))


def add_template(base):
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")


@pytest.mark.parametrize(("change", "what"), [(swap_tokens, "vocabulary"), (add_template, "chat template")])
def test_another_tokenizer_is_refused(place, change, what):
    base, _, arguments = place
    assert invoke("predict", *arguments).exit_code == 0
    change(base)
    assert f"the tokenizer's {what} is not that" in refused("predict", *arguments)


@pytest.mark.parametrize("which", [0, 1], ids=["model", "adapter"])
def test_weights_that_are_cut_off(place, which):
    (weights,) = place[which].glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    assert "Error while deserializing header" in refused("predict", *place[2])
