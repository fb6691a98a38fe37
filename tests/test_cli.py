from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import version

import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner

import laplace_kernels
from laplace_lora_fast import LaplaceLoRA, LaplaceWarning, cli, cli_checks, doctor
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
@pytest.mark.parametrize("options", [[], ["--mean", "refit"], ["--prior", "loo"]])
def test_refit_needs_no_held_out_rows(files, tmp_path, options):
    folder, common = files
    result = invoke("fit", *common, "--data", folder / "train.jsonl", "--out", tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert "mean refit" in result.output
    assert "chosen by loo" in result.output
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
    assert "mean map; prior precision 7.5." in result.output


@pytest.mark.filterwarnings("default::laplace_lora_fast.errors.LaplaceWarning")
@pytest.mark.parametrize(
    "options",
    [
        ["--structure", "kfac"],
        ["--rank", "2"],
        ["--fisher", "mc"],
        ["--mean", "map"],
        ["--prior-structure", "ab"],
    ],
)
def test_the_evidence_is_the_last_resort_and_says_so(files, tmp_path, options):
    folder, common = files
    result = invoke("fit", *common, "--data", folder / "train.jsonl", "--out", tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert "warning: without held-out rows the evidence" in result.stderr
    assert "chosen by marglik" in result.output


def test_prior_precisions_of_many_layers_are_summed_up(files, tmp_path):
    folder, common = files
    options = ["--prior", "marglik", "--prior-structure", "layerwise"]
    result = invoke("fit", *common, "--data", folder / "train.jsonl", "--out", tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert " by layer, chosen by marglik" in result.output


@pytest.mark.filterwarnings("default::laplace_lora_fast.errors.LaplaceWarning")
def test_many_rows_are_not_refitted(files, tmp_path, monkeypatch):
    folder, common = files
    monkeypatch.setattr(cli_checks, "MOST_REFIT_ROWS", 11)
    result = invoke("fit", *common, "--data", folder / "train.jsonl", "--out", tmp_path)
    assert "mean map" in result.output
    assert "chosen by marglik" in result.output


@pytest.mark.filterwarnings("default::laplace_lora_fast.errors.LaplaceWarning")
def test_the_grid_can_be_chosen(files, tmp_path):
    folder, common = files
    data = ["--data", folder / "train.jsonl", "--out", tmp_path]
    result = invoke("fit", *common, *data, "--prior", "loo", "--grid", "2e-8", "2e-7")
    assert result.exit_code == 0, result.output
    assert 2e-8 <= LaplaceLoRA.load(tmp_path, api(folder)[0]).prior_precision <= 2e-7
    assert cli_checks.spread((1.0, 100.0), "loo") == pytest.approx(torch.logspace(0, 2, 21).tolist())


def test_an_edge_of_the_grid_is_explained():
    grid = [0.1, 1.0, 10.0]
    assert cli_checks.at_the_edge(1.0, grid, "map") == []
    assert "the trained adapter" in cli_checks.at_the_edge(10.0, grid, "map")[0]
    assert "without its adapter" in cli_checks.at_the_edge(10.0, grid, "refit")[0]
    assert len(cli_checks.at_the_edge({"A": 0.1, "B": 10.0}, grid, "map")) == 2


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
    monkeypatch.setenv("COLUMNS", "80")
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    assert "…" not in result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert torch.__version__ in result.output
    assert "matplotlib" in result.output
    rows = doctor.kernel_rows(torch.device("cpu"), laplace_kernels.explain)
    for op in laplace_kernels.OPS:
        assert op in result.output
        choice = laplace_kernels.explain(op, "cpu", torch.float32)
        serving = [
            r for r in rows if op in r[2].split(", ") and "float32" in r[3].split(", ") and r[1] == "yes"
        ]
        assert [r[0] for r in serving] == [choice.backend]


def test_doctor_puts_one_verdict_in_one_row():
    def explain(op, device, dtype):
        reason = "it cannot" if dtype is torch.float32 else f"it has no {op}"
        return laplace_kernels.dispatch.Choice(op, device, dtype, "reference", "last", {"triton": reason})

    ops = ", ".join(laplace_kernels.OPS)
    assert doctor.kernel_rows(torch.device("cpu"), explain) == [
        ("reference", "yes", ops, "float32, bfloat16", "last"),
        ("triton", "no", ops, "float32", "it cannot"),
        ("triton", "no", ops, "bfloat16", "it has no such op"),
    ]


def test_a_log_has_no_bars(files, tmp_path):
    folder, common = files
    code = "from laplace_lora_fast.cli import main; main()"
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
from laplace_lora_fast import cli
try:
    cli.app([sys.argv[1]])
finally:
    assert not {"torch", "transformers", "peft"} & set(sys.modules), "heavy imports"
"""
    for option, said in (("--help", "Calibrated"), ("--version", version("laplace-lora-fast"))):
        run = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert said in run.stdout


BAD = {
    "no data": (["--data", "none.jsonl"], "none.jsonl: cannot be read"),
    "bad row": (["--data", "bad.jsonl"], "bad.jsonl, line 2: field 'label' is missing"),
    "no adapter": (["--adapter", "."], "holds no adapter_config.json"),
    "no model": (["--model", "./none"], "model './none' cannot be loaded"),
    "dtype": (["--dtype", "int8"], "--dtype must be"),
    "device": (["--device", "nowhere"], "--device nowhere cannot be used"),
    "device of another build": (["--device", "xpu"], "--device xpu cannot be used"),
    "prior": (["--prior", "best"], "--prior must be val_nll, loo, marglik or a number"),
    "negative prior": (["--prior", "-1"], "--prior must be positive"),
    "no prior": (["--prior", "0"], "--prior must be positive"),
    "prior nan": (["--prior", "nan"], "--prior must be positive"),
    "loo of the map": (["--prior", "loo", "--mean", "map"], "--prior loo needs --mean refit"),
    "loo with ab": (["--mean", "refit", "--prior-structure", "ab"], "--prior-structure must be scalar with"),
    "layerwise val_nll": (
        ["--val", "train.jsonl", "--prior-structure", "layerwise"],
        "--prior-structure must be scalar or ab with",
    ),
    "prior structure": (["--prior", "marglik", "--prior-structure", "x"], "--prior-structure must be"),
    "grid": (["--prior", "loo", "--grid", "2", "1"], "--grid must be two ascending"),
    "grid of the evidence": (["--prior", "marglik", "--grid", "1", "2"], "--grid is for"),
    "val_nll without val": (["--prior", "val_nll"], "--prior val_nll and --val need each other"),
    "val without val_nll": (["--prior", "marglik", "--val", "train.jsonl"], "need each other"),
    "structure": (["--structure", "dense", "--prior", "1"], "structure must be"),
    "kfac": (["--kfac", "sum", "--prior", "1"], "kfac must be"),
    "fisher": (["--fisher", "none", "--prior", "1"], "fisher must be"),
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


@pytest.fixture
def no_work(monkeypatch):
    """Fails where a fit or a prediction begins."""

    def work(*args, **kwargs):
        raise AssertionError("the work began")

    for name in ("fit", "predict_loader"):
        monkeypatch.setattr(LaplaceLoRA, name, work)


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
def test_a_missing_extra_is_named_with_its_command(files, tmp_path, monkeypatch, command, extras):
    folder, common = files
    for module in ("evaluate", "report", "demo.run"):
        monkeypatch.delitem(sys.modules, f"laplace_lora_fast.{module}", raising=False)
    for module in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    arguments = [*common, "--data", folder / "test.jsonl"] if command == "evaluate" else ["--out", tmp_path]
    result = invoke(command, *arguments)
    assert result.exit_code == 2
    assert f'pip install "laplace-lora-fast{extras}"' in result.stderr
    assert f'pip install ".{extras}"' in result.stderr


def test_a_message_that_only_announces_is_completed():
    assert cli_checks.one_line(ValueError("short\nlong")) == "short"
    assert cli_checks.one_line(ValueError("")) == "ValueError"
    sizes = "Errors in loading:\n\tsize mismatch for q:\n copying a param\n\tsize mismatch for v: x"
    assert (
        cli_checks.one_line(RuntimeError(sizes)) == "Errors in loading: size mismatch for q: copying a param"
    )
    assert cli_checks.one_line(RuntimeError("Errors:")) == "Errors:"


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
