from __future__ import annotations

import json
import logging
import shutil
import warnings

import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner

import laplace_kernels
from laplace_lora_fast import LaplaceLoRA, LaplaceWarning, cli
from laplace_lora_fast.evaluate import Predictions
from laplace_lora_fast.prompts import answer_token_ids, load_causal_lm, make_batches, read_rows
from tests import words


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Arguments that name a model, an adapter and data, and the folder they lie in."""
    folder = tmp_path_factory.mktemp("cli")
    base, adapter = words.save_model(folder)
    for name, count in (("train", 12), ("val", 8), ("test", 10)):
        words.write_rows(folder / f"{name}.jsonl", words.rows(count, seed=count))
    return folder, ["--model", str(base), "--adapter", str(adapter), "--batch-size", "4"]


@pytest.fixture(scope="module")
def posterior(files):
    """Folder of a posterior fitted by the command."""
    folder, common = files
    result = invoke(
        "fit", *common, "--data", folder / "train.jsonl", "--out", folder / "post", "--prior", "marglik"
    )
    assert result.exit_code == 0, result.output
    return folder / "post"


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def invoke(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def api(folder):
    """Model, answers and a loader for rows, by the Python API."""
    base, tokenizer = load_causal_lm(str(folder / "base"))
    model = PeftModel.from_pretrained(base, str(folder / "adapter"))
    answers = answer_token_ids(tokenizer, read_rows(folder / "train.jsonl"))
    return model, answers, lambda name: make_batches(tokenizer, read_rows(folder / f"{name}.jsonl"), 4)


# The labels are drawn: held-out NLL may be best with hardly any uncertainty, which the command has to say.
@pytest.mark.filterwarnings("default::laplace_lora_fast.errors.LaplaceWarning")
def test_fit_does_what_the_api_does(files, tmp_path):
    folder, common = files
    options = [
        "--kfac",
        "expand",
        "--fisher",
        "empirical",
        "--rank",
        "3",
        "--prior-structure",
        "ab",
        "--seed",
        "5",
    ]
    data = ["--data", folder / "train.jsonl", "--val", folder / "val.jsonl"]
    result = invoke("fit", *common, *data, "--out", tmp_path / "post", *options)
    assert result.exit_code == 0, result.output
    model, answers, loader = api(folder)
    expected = LaplaceLoRA(model, answer_token_ids=answers, kfac="expand", fisher="empirical", rank=3, seed=5)
    expected.fit(loader("train"), progress=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LaplaceWarning)
        expected.optimize_prior_precision(
            "val_nll", prior_structure="ab", val_loader=loader("val"), progress=False
        )
    said = [line for line in result.stderr.splitlines() if line.startswith("warning:")]
    assert said == [f"warning: {w.message}" for w in caught if w.category is LaplaceWarning]
    got = LaplaceLoRA.load(tmp_path / "post", model)
    assert got.prior_precision == expected.prior_precision
    batch = loader("test")[0]
    torch.testing.assert_close(got.predict(batch), expected.predict(batch))


@pytest.mark.filterwarnings("ignore::laplace_lora_fast.errors.LaplaceWarning")
def test_refit_needs_no_held_out_rows(files, tmp_path):
    folder, common = files
    result = invoke("fit", *common, "--data", folder / "train.jsonl", "--out", tmp_path, "--mean", "refit")
    assert result.exit_code == 0, result.output
    assert "(loo)" in result.output
    model, answers, loader = api(folder)
    expected = LaplaceLoRA(model, answer_token_ids=answers, mean="refit").fit(loader("train"), progress=False)
    expected.optimize_prior_precision("loo", progress=False)
    got, batch = LaplaceLoRA.load(tmp_path, model), loader("test")[0]
    assert got.prior_precision == expected.prior_precision
    torch.testing.assert_close(got.predict(batch), expected.predict(batch))


def test_a_number_is_the_prior_precision(files, tmp_path):
    folder, common = files
    result = invoke("fit", *common, "--data", folder / "train.jsonl", "--out", tmp_path, "--prior", "7.5")
    assert result.exit_code == 0, result.output
    assert LaplaceLoRA.load(tmp_path, api(folder)[0]).prior_precision == 7.5


def test_evaluate_scores_map_and_laplace(files, posterior, tmp_path):
    folder, common = files
    outputs = [
        "--json",
        tmp_path / "scores" / "s.json",
        "--plots",
        tmp_path / "plots",
        "--link-approx",
        "bridge",
    ]
    result = invoke("evaluate", *common, "--data", folder / "test.jsonl", "--posterior", posterior, *outputs)
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "scores" / "s.json").read_text())
    model, _, loader = api(folder)
    la = LaplaceLoRA.load(posterior, model)
    for method, link in (("MAP", "map"), ("Laplace", "bridge")):
        expected = Predictions(*la.predict_loader(loader("test"), link_approx=link, progress=False)).metrics()
        assert scores[method]["nll"] == pytest.approx(expected.nll, rel=1e-6)
        assert scores[method]["ece"] == pytest.approx(expected.ece, rel=1e-6)
        assert f"{expected.nll:.3f}" in result.output
    assert scores["MAP"] != scores["Laplace"]
    assert {f.name for f in (tmp_path / "plots").iterdir()} == {"reliability.png", "confidence.png"}


def test_doctor_names_every_op_and_its_backend(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    for op in laplace_kernels.OPS:
        choice = laplace_kernels.explain(op, "cpu", torch.float32)
        line = next(line for line in result.output.splitlines() if f" {op} " in line)
        assert choice.backend in line
    assert torch.__version__ in result.output


BAD = {
    "no data": (["--data", "none.jsonl"], "none.jsonl: cannot be read"),
    "bad row": (["--data", "bad.jsonl"], "bad.jsonl, line 2: field 'label' is missing"),
    "no adapter": (["--adapter", "."], "holds no adapter_config.json"),
    "no model": (["--model", "./none"], "model './none' cannot be loaded"),
    "dtype": (["--dtype", "int8"], "--dtype must be"),
    "device": (["--device", "nowhere"], "cannot be loaded on nowhere"),
    "prior": (["--prior", "best"], "--prior must be val_nll, loo, marglik or a number"),
    "negative prior": (["--prior", "-1"], "prior_precision must be positive"),
    "val_nll without val": (["--prior", "val_nll"], "--prior val_nll and --val need each other"),
    "val without val_nll": (["--prior", "marglik", "--val", "train.jsonl"], "need each other"),
    "structure": (["--structure", "dense"], "structure must be"),
    "kfac": (["--kfac", "sum"], "kfac must be"),
    "fisher": (["--fisher", "none"], "fisher must be"),
    "other choices": (["--val", "reversed.jsonl"], "reversed.jsonl: field 'choices'"),
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
    result = invoke("fit", *common, *data, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    complaint = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(complaint) == 1
    assert message in complaint[0]
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


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
