from __future__ import annotations

import dataclasses
import json
import shutil
import sys

import pytest

from laplace_lora_fast.cli import checks
from laplace_lora_fast.options import kinds, short_name
from laplace_lora_fast.structures import Structure
from tests import words
from tests.cli.run import invoke, refused

BAD = {
    "no data": ("--data none.jsonl", "none.jsonl: cannot be read"),
    "bad row": ("--data bad.jsonl", "bad.jsonl, line 2: field 'label' is missing"),
    "no adapter": ("--adapter .", "holds no adapter_config.json"),
    "no such adapter": ("--adapter none", "--adapter none does not exist"),
    "no model": ("--model ./none", "model './none' cannot be loaded on cpu: ./none does not exist"),
    "no model here or on the hub": ("--model models/none", "cpu: no folder of that name exists here, and"),
    "no such file": ("--model none.gguf", "none.gguf does not exist"),
    "dtype": ("--dtype int8", "--dtype must be"),
    "device": ("--device nowhere", "--device nowhere cannot be used"),
    "device of another build": ("--device xpu", "--device xpu cannot be used"),
    "prior": (
        "--prior best",
        "--prior must be a number, cross_fit, evidence, held_out or leave_one_out, got 'best'",
    ),
    "negative prior": ("--prior -1", "--prior must be positive"),
    "no prior": ("--prior 0", "--prior must be positive"),
    "prior nan": ("--prior nan", "--prior must be positive"),
    "one left out of rows": (
        "--prior leave_one_out --structure rows --no-refit",
        "needs --structure rows --refit",
    ),
    "one left out of kfac": ("--prior leave_one_out --structure kfac", "needs --structure rows --refit"),
    "per": ("--prior evidence --per weight", "per must be one of"),
    "per layer held out": ("--val train.jsonl --per layer", "per must be one of ['all', 'side', 'head']"),
    "per side left out": (
        "--prior leave_one_out --per side",
        "--per is an option of --prior cross_fit, evidence or held_out, not of --prior leave_one_out",
    ),
    "per side of a number": (
        "--prior 1 --per side",
        "--per is an option of --prior cross_fit, evidence or held_out, not",
    ),
    "per side refitted": ("--structure rows --refit --prior evidence --per side", "--per must be all with"),
    "grid": ("--prior leave_one_out --grid 2 1", "--grid must be two ascending"),
    "grid of the evidence": (
        "--prior evidence --grid 1 2",
        "--grid is an option of --prior cross_fit, held_out or leave_one_out, not of --prior evidence",
    ),
    "grid of a number": (
        "--prior 1 --grid 1 2",
        "--grid is an option of --prior cross_fit, held_out or leave_one_out",
    ),
    "held out without val": ("--prior held_out", "--prior held_out needs --val"),
    "val of the evidence": (
        "--prior evidence --val train.jsonl",
        "--val is an option of --prior held_out, not of --prior evidence",
    ),
    "val of a number": ("--prior 1 --val train.jsonl", "--val is an option of --prior held_out"),
    "structure": ("--structure dense --prior 1", "--structure must be auto, "),
    "tokens": ("--structure kfac --tokens sum --prior 1", "tokens must be"),
    "fisher": ("--structure rows --fisher none --prior 1", "fisher must be"),
    "factors": ("--structure kfac --factors some --prior 1", "factors must be"),
    "columns of no sketch": ("--structure kfac --factors dense --columns 3 --prior 1", "leave them out"),
    "refit of another fisher": ("--structure rows --refit --fisher mc", "refit=True needs fisher='exact'"),
    "other choices": ("--val reversed.jsonl", "reversed.jsonl: field 'choices'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_of_fit_is_one_line(files, tmp_path, monkeypatch, case):
    folder, common = files
    options, message = BAD[case]
    monkeypatch.chdir(folder)
    good = words.rows(2)
    words.write_rows(folder / "bad.jsonl", [good[0], {k: v for k, v in good[1].items() if k != "label"}])
    words.write_rows(folder / "reversed.jsonl", words.rows(3, choices=("B", "A")))
    data = [] if "--data" in options else ["--data", "train.jsonl"]
    assert message in refused("fit", *common, *data, "--out", tmp_path / "out", *options.split())
    assert not (tmp_path / "out").exists()


VALUES = {
    "columns": "3",
    "refit": None,
    "tokens": "reduce",
    "rank": "2",
    "factors": "auto",
    "fisher": "exact",
}


@pytest.mark.parametrize("option", VALUES)
def test_an_option_that_a_structure_has_not_is_refused(files, tmp_path, option):
    folder, common = files
    value = VALUES[option]
    given = [f"--{option}", *([] if value is None else [value])]
    data = ["--data", folder / "train.jsonl", "--out", tmp_path / "out", "--prior", "1"]
    fields = {
        short_name(kind): [field.name for field in dataclasses.fields(kind)] for kind in kinds(Structure)
    }
    without = ["auto", *(name for name, has in fields.items() if option not in has)]
    assert len(without) <= len(fields)
    for name in without:
        complaint = refused("fit", *common, *data, *given, "--structure", name)
        assert f"--{option} is an option of --structure " in complaint
        assert f"not of --structure {name}" in complaint
    assert not (tmp_path / "out").exists()


def test_places_that_cannot_be_written_to_are_refused_first(files, posterior, tmp_path, no_work):
    folder, common = files
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "folder"):
        result = invoke("fit", *common, "--data", folder / "train.jsonl", "--prior", "1", "--out", place)
        assert result.exit_code == 2, result.output
        assert "error:" in result.stderr
    common = [*common, "--data", folder / "test.jsonl", "--posterior", posterior]
    for option in (["--json", tmp_path / "file" / "x.json"], ["--plots", tmp_path / "file"]):
        assert invoke("evaluate", *common, *option).exit_code == 2
    assert invoke("predict", *common, "--out", tmp_path / "file" / "x.jsonl").exit_code == 2
    assert invoke("demo", "--out", tmp_path / "file").exit_code == 2


def test_an_unknown_link_is_refused_first(files, posterior, no_work, tmp_path):
    folder, common = files
    common = [*common, "--data", folder / "test.jsonl", "--posterior", posterior, "--link-approx", "foo"]
    for command in (["evaluate"], ["predict", "--out", tmp_path / "x"]):
        result = invoke(*command, *common)
        assert result.exit_code == 2
        assert "--link-approx must be probit, mc, bridge or map" in result.stderr


@pytest.mark.parametrize(("command", "extras"), [("evaluate", "[cli,evaluate]"), ("demo", "[demo]")])
def test_a_missing_extra_is_named_with_its_command(files, posterior, tmp_path, monkeypatch, command, extras):
    folder, common = files
    missing, module = {"evaluate": ("matplotlib", "evaluation.plots"), "demo": ("gguf", "demo.run")}[command]
    monkeypatch.delitem(sys.modules, f"laplace_lora_fast.{module}", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    if command == "evaluate":
        arguments = [*common, "--data", folder / "test.jsonl", "--posterior", posterior, "--plots", tmp_path]
    else:
        arguments = ["--out", tmp_path]
        monkeypatch.setattr("laplace_lora_fast.demo.task.load_model", lambda: __import__("gguf"))
    complaint = refused(command, *arguments)
    assert f'pip install "laplace-lora-fast{extras}"' in complaint
    assert f'pip install ".{extras}"' in complaint


def test_a_message_that_only_announces_is_completed():
    assert checks.one_line(ValueError("short\nlong")) == "short"
    assert checks.one_line(ValueError("")) == "ValueError"
    sizes = "Errors in loading:\n\tsize mismatch for q:\n copying a param\n\tsize mismatch for v: x"
    assert checks.one_line(RuntimeError(sizes)) == "Errors in loading: size mismatch for q: copying a param"
    assert checks.one_line(RuntimeError("Errors:")) == "Errors:"


def test_evaluate_refuses_what_does_not_belong_together(files, posterior, tmp_path):
    folder, common = files
    words.write_rows(folder / "reversed.jsonl", words.rows(3, choices=("B", "A")))
    reversed_ = invoke("evaluate", *common, "--data", folder / "reversed.jsonl", "--posterior", posterior)
    assert reversed_.exit_code == 2
    assert "in another order" in reversed_.stderr
    missing = invoke("evaluate", *common, "--data", folder / "test.jsonl", "--posterior", tmp_path)
    assert missing.exit_code == 2
    assert "does not exist" in missing.stderr


def test_an_adapter_of_another_model_is_refused(files, tmp_path):
    folder, common = files
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for change in ({"target_modules": ["c_attn"]}, {"r": 3}):  # other layers, other shapes
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | change))
        arguments = [*common, "--adapter", tmp_path / "adapter", "--data", folder / "train.jsonl"]
        result = invoke("fit", *arguments, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert "does not fit model" in result.stderr


def test_brackets_in_messages_survive(files, tmp_path):
    _, common = files
    result = invoke("fit", *common, "--data", tmp_path / "[bold]x.jsonl")
    assert "[bold]x.jsonl: cannot be read" in result.stderr
