from __future__ import annotations

import json
import subprocess
import sys
import warnings
from importlib.metadata import version

import pytest
import torch

from laplace_lora_fast import (
    EKFAC,
    KFAC,
    Answers,
    Diagonal,
    Evidence,
    HeldOut,
    LaplaceLoRA,
    LaplaceWarning,
    Rows,
)
from laplace_lora_fast.cli import checks
from laplace_lora_fast.data.prompts import load_causal_lm, make_batches, read_rows
from laplace_lora_fast.weights import weight_names
from tests import words
from tests.cli.run import api, invoke, refused

# The labels are drawn: held-out NLL may be best with hardly any uncertainty, which the command has to say.
loud = pytest.mark.filterwarnings("default::laplace_lora_fast.errors.LaplaceWarning")


@loud
def test_fit_does_what_the_api_does(files, tmp_path):
    folder, common = files
    options = ["--structure", "kfac", "--tokens", "expand", "--fisher", "empirical", "--rank", "3"]
    options += ["--per", "side", "--seed", "5"]
    data = ["--data", folder / "train.jsonl", "--val", folder / "val.jsonl"]
    result = invoke("fit", *common, *data, "--out", tmp_path / "post", *options)
    assert result.exit_code == 0, result.output
    model, answers, loader = api(folder)
    structure = KFAC(tokens="expand", fisher="empirical", rank=3)
    expected = LaplaceLoRA(model, Answers(answers), structure=structure, seed=5)
    expected.fit(loader("train"), progress=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LaplaceWarning)
        expected.optimize_prior_precision(HeldOut(loader("val"), per="side"), progress=False)
    said = [line for line in result.stderr.splitlines() if line.startswith("warning:")]
    assert said == [f"warning: {w.message}" for w in caught if w.category is LaplaceWarning]
    got = LaplaceLoRA.load(tmp_path / "post", model)
    assert got.structure == structure
    assert got.prior_precision == expected.prior_precision
    batch = loader("test")[0]
    torch.testing.assert_close(got.predict(batch), expected.predict(batch))


@loud
def test_a_posterior_of_some_layers_and_weights(files, tmp_path):
    folder, common = files
    data = ["--data", folder / "train.jsonl", "--out", tmp_path, "--prior", "2"]
    chosen = ["--layers", "(?!.*q_proj).*", "--trained", r".*lora_B"]
    result = invoke("fit", *common, *data, *chosen)
    assert result.exit_code == 0, result.output
    model, answers, loader = api(folder)
    names = [
        name.removesuffix(".default.weight")
        for name, _ in model.named_parameters()
        if "v_proj.lora_B" in name
    ]
    expected = LaplaceLoRA(model, Answers(answers), trained=names, prior_precision=2.0)
    expected.fit(loader("train"), progress=False)
    got = LaplaceLoRA.load(tmp_path, model)
    assert [str(name) for name in weight_names(got.layers)] == names
    batch = loader("test")[0]
    torch.testing.assert_close(got.predict(batch), expected.predict(batch))
    rows = ["--data", folder / "test.jsonl", "--posterior", tmp_path, "--out", tmp_path / "probs.jsonl"]
    assert invoke("predict", *common, *rows).exit_code == 0
    assert "no regular expression" in refused("fit", *common, *data, "--layers", "(")
    assert "trained" in refused("fit", *common, *data, "--trained", "lora_B")


STRUCTURES = {
    "--structure auto": "auto",
    "--structure rows --columns 7": Rows(columns=7),
    "--structure rows --refit": Rows(refit=True),
    "--structure rows --no-refit --fisher mc": Rows(fisher="mc"),
    "--structure kfac --factors sketch --columns 9 --rank 2": KFAC(factors="sketch", columns=9, rank=2),
    "--structure ekfac --factors dense --tokens paper": EKFAC(factors="dense", tokens="paper"),
    "--structure diagonal --fisher empirical": Diagonal(fisher="empirical"),
}


@pytest.mark.parametrize("options", STRUCTURES)
def test_options_make_the_structure(files, tmp_path, options):
    folder, common = files
    data = ["--data", folder / "train.jsonl", "--out", tmp_path, "--prior", "1"]
    result = invoke("fit", *common, *data, *options.split())
    assert result.exit_code == 0, result.output
    assert LaplaceLoRA.load(tmp_path, api(folder)[0]).structure == STRUCTURES[options]


@pytest.mark.filterwarnings("ignore::laplace_lora_fast.errors.LaplaceWarning")
@pytest.mark.parametrize(
    "options", ["", "--structure rows", "--structure rows --refit", "--prior leave_one_out"]
)
def test_the_refit_needs_no_held_out_rows(files, tmp_path, options):
    folder, common = files
    data = ["--data", folder / "train.jsonl", "--out", tmp_path]
    result = invoke("fit", *common, *data, *options.split())
    assert result.exit_code == 0, result.output
    assert "Fitted Rows(columns=None, refit=True, fisher='exact') on 12 rows" in result.output
    way = "leave_one_out" if "leave_one_out" in options else "evidence"
    assert f"chosen by {way}" in result.output
    assert "warning: without held-out rows" not in result.stderr
    model, answers, loader = api(folder)
    expected = LaplaceLoRA(model, Answers(answers), structure=Rows(refit=True))
    expected.fit(loader("train"), progress=False)
    expected.optimize_prior_precision(way, progress=False)
    got, batch = LaplaceLoRA.load(tmp_path, model), loader("test")[0]
    assert got.prior_precision == expected.prior_precision
    torch.testing.assert_close(got.predict(batch), expected.predict(batch))


def test_a_number_is_the_prior_precision(files, tmp_path):
    folder, common = files
    result = invoke("fit", *common, "--data", folder / "train.jsonl", "--out", tmp_path, "--prior", "7.5")
    assert result.exit_code == 0, result.output
    assert LaplaceLoRA.load(tmp_path, api(folder)[0]).prior_precision == 7.5
    assert "Fitted Rows(columns=None, refit=False" in result.output
    assert "prior precision 7.5." in result.output


@loud
@pytest.mark.parametrize(
    "options",
    ["--structure kfac", "--structure rows --fisher mc", "--structure rows --no-refit", "--per side"],
)
def test_the_evidence_is_the_last_resort_and_says_so(files, tmp_path, options):
    folder, common = files
    data = ["--data", folder / "train.jsonl", "--out", tmp_path]
    result = invoke("fit", *common, *data, *options.split())
    assert result.exit_code == 0, result.output
    assert "warning: without held-out rows the evidence" in result.stderr
    assert "chosen by evidence" in result.output


@loud
def test_held_out_rows_choose_where_there_are_some(files, tmp_path):
    folder, common = files
    data = ["--data", folder / "train.jsonl", "--val", folder / "val.jsonl", "--out", tmp_path]
    result = invoke("fit", *common, *data, "--structure", "rows", "--refit")
    assert result.exit_code == 0, result.output
    assert "refit=True" in result.output
    assert "chosen by held_out" in result.output


def test_prior_precisions_of_many_layers_are_summed_up(files, tmp_path):
    folder, common = files
    data = ["--data", folder / "train.jsonl", "--out", tmp_path]
    result = invoke("fit", *common, *data, "--prior", "evidence", "--per", "layer")
    assert result.exit_code == 0, result.output
    assert " by layer, chosen by evidence" in result.output
    model, answers, loader = api(folder)
    expected = LaplaceLoRA(model, Answers(answers)).fit(loader("train"), progress=False)
    expected.optimize_prior_precision(Evidence(per="layer"))
    assert LaplaceLoRA.load(tmp_path, model).prior_precision == pytest.approx(expected.prior_precision)


@loud
def test_many_rows_are_not_refitted(files, tmp_path, monkeypatch):
    folder, common = files
    monkeypatch.setattr(checks, "MOST_REFIT_ROWS", 11)
    result = invoke("fit", *common, "--data", folder / "train.jsonl", "--out", tmp_path)
    assert "refit=False" in result.output
    assert "chosen by evidence" in result.output


@loud
@pytest.mark.parametrize("prior", ["leave_one_out", "held_out"])
def test_the_grid_can_be_chosen(files, tmp_path, prior):
    folder, common = files
    data = ["--data", folder / "train.jsonl", "--out", tmp_path]
    data += ["--val", folder / "val.jsonl"] if prior == "held_out" else []
    result = invoke("fit", *common, *data, "--prior", prior, "--grid", "2e-8", "2e-7")
    assert result.exit_code == 0, result.output
    assert 2e-8 <= LaplaceLoRA.load(tmp_path, api(folder)[0]).prior_precision <= 2e-7
    assert checks.spread((1.0, 100.0)) == pytest.approx(torch.logspace(0, 2, 21).tolist())


def test_predict_writes_probabilities_in_the_rows_order(files, posterior, tmp_path):
    folder, common = files
    rows = words.rows(9, seed=3)
    for row in rows:
        del row["label"]
    data = words.write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "new" / "probs.jsonl"
    result = invoke("predict", *common, "--data", data, "--posterior", posterior, "--out", out)
    assert result.exit_code == 0, result.output
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{k: v for k, v in line.items() if k != "probs"} for line in written] == rows
    model, _, _ = api(folder)
    la = LaplaceLoRA.load(posterior, model)
    _, tokenizer = load_causal_lm(str(folder / "base"))
    alone = [
        la.predict(batch)
        for row in read_rows(data, labelled=False)
        for batch in make_batches(tokenizer, [row], 1)
    ]
    torch.testing.assert_close(
        torch.tensor([line["probs"] for line in written]), torch.cat(alone), rtol=1e-4, atol=1e-5
    )


def test_evaluate_scores_map_and_laplace(files, posterior, tmp_path):
    folder, common = files
    outputs = ["--json", tmp_path / "scores" / "s.json", "--plots", tmp_path / "plots"]
    outputs += ["--markdown", tmp_path / "scores.md"]
    arguments = [*common, "--data", folder / "test.jsonl", "--posterior", posterior, *outputs]
    for _ in range(2):  # results are written over
        result = invoke("evaluate", *arguments, "--link-approx", "bridge")
        assert result.exit_code == 0, result.output
    assert [file.name for file in (tmp_path / "scores").iterdir()] == ["s.json"]
    scores = json.loads((tmp_path / "scores" / "s.json").read_text())
    model, _, loader = api(folder)
    la = LaplaceLoRA.load(posterior, model)
    for method, link in (("MAP", "map"), ("Laplace", "bridge")):
        expected = la.predictions(loader("test"), link_approx=link, progress=False).metrics()
        assert scores[method]["nll"] == pytest.approx(expected.nll, rel=1e-6)
        assert scores[method]["ece"] == pytest.approx(expected.ece, rel=1e-6)
        assert f"{expected.nll:.3f}" in result.output
        low, high = scores[method]["intervals"]["nll"]
        assert low <= scores[method]["nll"] <= high
        assert f"{expected.nll:.3f} [{low:.3f}, {high:.3f}]" in (tmp_path / "scores.md").read_text()
    assert scores["MAP"] != scores["Laplace"]
    change = scores["Laplace"]["minus_first"]["nll"]
    assert change["value"] == pytest.approx(scores["Laplace"]["nll"] - scores["MAP"]["nll"])
    drawn = {"reliability.png", "confidence.png", "risk_coverage.png"}
    assert {f.name for f in (tmp_path / "plots").iterdir()} == drawn


def test_a_log_has_no_bars(files, tmp_path):
    folder, common = files
    code = "from laplace_lora_fast.cli.main import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "fit",
        *common,
        "--data",
        folder / "train.jsonl",
        "--out",
        tmp_path,
    ]
    run = subprocess.run([str(part) for part in [*command, "--prior", "1"]], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "%|" not in run.stdout + run.stderr
    assert "\r" not in run.stdout + run.stderr


def test_help_and_version_need_no_torch():
    code = """
import sys
from laplace_lora_fast.cli import main
try:
    main.app([sys.argv[1]])
finally:
    assert not {"torch", "transformers", "peft"} & set(sys.modules), "heavy imports"
"""
    for option, said in (("--help", "Calibrated"), ("--version", version("laplace-lora-fast"))):
        run = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert said in run.stdout
