"""Published protocols: their prompts, what their pieces equal, and dry runs that end in the paper's table."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.protocols import dry, plan, run, table
from bench.protocols.config import Protocol, read
from bench.protocols.methods import METHODS
from bench.protocols.model import (
    Encoded,
    SomeAnswers,
    adapted,
    answer_ids,
    batched,
    encoded,
    load,
    task_of,
    with_answers_alone,
)
from bench.protocols.records import questions, text_of
from bench.protocols.train import factor, kept_steps, order_of
from laplace_lora_fast import Answers, LaplaceLoRA, Rows
from laplace_lora_fast.evaluation.predictions import Predictions
from laplace_lora_fast.fitting.planner import Rates
from tests import tiny, words

CONFIGS = Path(run.__file__).parent / "configs"
ROWS = [path for path in sorted(CONFIGS.glob("*.toml")) if path.stem != "laplace_lora"]
pytestmark = pytest.mark.filterwarnings("ignore::laplace_lora_fast.errors.LaplaceWarning")


def protocol(name: str) -> Protocol:
    return read(CONFIGS / f"{name}.toml")


def first(name: str, place: int = 0) -> tuple[str, str]:
    """The prompt of a set's first record, and its answer."""
    found = protocol(name)
    source = [found.train_set, *found.test_sets][place]
    question = questions(source, str(dry.ROWS), found.prompt)[0]
    return text_of(question, found.prompt, source.prompt), found.prompt.answers[question.label]


def test_prompts_are_those_of_the_published_code() -> None:
    select = "Select one of the choices that answers the following question:"
    assert first("winogrande_s") == (
        f"{select} During flu season people flocked to the pharmacies to buy aspirin but not medication because the _ "
        "was sold out. Choices: A. aspirin. B medication. Answer:",
        "B",
    )
    assert first("arc_challenge", 1) == (
        f"{select} The voltage is held constant in an electric circuit. What will happen to the current in this "
        "circuit if the resistance is doubled? Choices: A. The current will be tripled. B. The current will be "
        "doubled. C. The current will be cut in half. D. The current will stay the same. Answer:",
        "C",
    )
    text, answer = first("arc_easy", 1)
    assert text.endswith("Choices: A. Inertia. B. Gravity. C. Magnetism. D. Momentum. Answer:")
    assert answer == "B"
    assert first("openbookqa") == (
        f"{select} A shadow at noon is Choices: A. Short. B. Long. C. Warm. D. Wet. Answer:",
        "A",
    )
    text, answer = first("boolq")
    assert text.startswith("Answer the question with only True or False: is there going to be another season")
    assert text.endswith(" Context: The season will be released on September 7, 2018.")
    assert answer == "True"
    assert first("scienceqa") == (f"{select}\nWhich is softer? Choices: A. pillow B. brick Answer:", "A")


def test_records_that_a_protocol_leaves_out() -> None:
    found = protocol("scienceqa")
    train = questions(found.train_set, str(dry.ROWS), found.prompt)
    assert len(train) == 14  # not the one that is no closed choice
    assert {len(each.choices) for each in train} == {2, 3, 4}
    grade12 = questions(found.test_sets[1], str(dry.ROWS), found.prompt)
    assert [each.fields["grade"] for each in grade12] == [12, 12]
    (law,) = [each for each in protocol("openbookqa").test_sets if each.name == "Law"]
    assert len(questions(law, str(dry.ROWS), found.prompt)) == 2
    gpqa = questions(found.test_sets[-1], str(dry.ROWS), found.prompt)
    assert gpqa[0].choices[gpqa[0].label] == "the strong force"
    with pytest.raises(ValueError, match="Law: record 6 is none of form 'winogrande'"):
        questions(replace(law, form="winogrande"), str(dry.ROWS), found.prompt)
    with pytest.raises(FileNotFoundError, match="should hold the records of Law"):
        questions(law, "nowhere", found.prompt)


def test_a_wrong_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text((CONFIGS / "arc_easy.toml").read_text().split("[train_set]")[0])
    (tmp_path / "laplace_lora.toml").write_text((CONFIGS / "laplace_lora.toml").read_text())
    with pytest.raises(ValueError, match=r"train_set\.name is missing"):
        read(tmp_path / "base.toml")
    (tmp_path / "more.toml").write_text('extends = "base.toml"\n[lora]\nrank = 8\n')
    with pytest.raises(ValueError, match=r"lora\.rank is no field: there are r, alpha"):
        read(tmp_path / "more.toml")


def test_values_of_a_row_go_before_those_it_extends() -> None:
    found = protocol("boolq")
    assert (found.prompt.max_length, found.prompt.answers) == (300, ["False", "True"])
    assert (found.seeds, found.train.learning_rate, found.lora.r) == ([21, 42, 87], 5e-5, 8)
    columns = [read(path).column for path in ROWS]
    assert sorted(columns) == list(range(1, len(ROWS) + 1))


def test_a_head_of_the_answers_alone_is_the_head() -> None:
    ids = torch.randint(1, tiny.VOCAB, (3, 6))
    full = words.base_model()
    expected = full(ids).logits[..., [5, 11, 7]]
    small = with_answers_alone(words.base_model(), [5, 11, 7])
    torch.testing.assert_close(small(ids).logits, expected)
    assert not small.get_output_embeddings().weight.requires_grad


def test_questions_with_fewer_answers() -> None:
    """Their probabilities and covariances are those of a task with so many answers."""
    model = tiny.tiny_llama()
    rows = [Encoded([3, 4, 5 + n], n % 2, 2 + n % 3, {}) for n in range(6)]
    task = task_of(rows, 4)
    assert isinstance(task, SomeAnswers)
    assert type(task_of([replace(row, choices=4) for row in rows], 4)) is Answers
    la = LaplaceLoRA(model, task, structure=Rows(columns=None)).fit(batched(rows, 3, task), progress=False)
    (batch,) = batched(rows, 6, task)
    probs = la.predict(batch)
    mean, cov = la.logit_distribution(batch)
    for row in range(6):
        count = int(batch["choices"][row])
        assert probs[row, count:].eq(0).all()
        assert probs[row].sum() == pytest.approx(1)
        assert cov[row, count:].eq(0).all()
        few = Answers(range(count))
        plain = LaplaceLoRA(model, few).fit(
            [{k: v[:1] for k, v in batch.items() if k != "choices"}], progress=False
        )
        own, _ = plain.logit_distribution({"input_ids": batch["input_ids"][row : row + 1]})
        torch.testing.assert_close(mean[row, :count], own[0], atol=1e-6, rtol=1e-6)


def test_tokens_of_prompts() -> None:
    found = protocol("boolq")
    _, tokenizer = dry.model(found)
    listed = questions(found.train_set, str(dry.ROWS), found.prompt)
    short = replace(found.prompt, max_length=12)
    rows = encoded(tokenizer, listed, short)
    assert {len(row.ids) for row in rows} == {12}
    assert {row.ids[-1] for row in rows} == {tokenizer.eos_token_id}
    whole = tokenizer(text_of(listed[0], found.prompt))["input_ids"]
    assert rows[0].ids[:-1] == whole[:11]
    assert tokenizer.convert_ids_to_tokens(answer_ids(tokenizer, found.prompt)) == ["False", "True"]
    with pytest.raises(ValueError, match="has no eos_token"):
        encoded(words.tokenizer(), listed, short)


def test_the_order_of_training_and_its_rate() -> None:
    rows = [Encoded([n], 0, 2, {"grade": n % 3}) for n in range(9)]
    by_grade = order_of(rows, "grade", seed=1)
    epoch = [next(by_grade) for _ in rows]
    assert [row.fields["grade"] for row in epoch] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [next(by_grade) for _ in rows] == epoch
    shuffled = order_of(rows, "shuffled", seed=1)
    first, second = ([next(shuffled) for _ in rows] for _ in range(2))
    assert sorted(row.ids for row in first) == sorted(row.ids for row in rows)
    assert first != second
    train = protocol("scienceqa").train
    assert [factor(step, train) for step in (0, 60, 120, 1060, 2000)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert kept_steps(protocol("arc_easy").train, 3) == [8000, 9000, 10000]


def test_the_calibration_error_is_the_package_s() -> None:
    torch.manual_seed(0)
    probs = torch.randn(200, 3).softmax(1)  # calibrated: bins with gaps of either sign
    predictions = Predictions(probs, probs.multinomial(1)[:, 0])
    assert table.ece(predictions, 15) == pytest.approx(predictions.metrics().ece, abs=1e-12)
    assert table.ece(predictions, 10) != pytest.approx(predictions.metrics().ece)


def test_plans_name_what_a_run_would_take() -> None:
    text = "\n".join(plan.lines(protocol("arc_easy"), None, 4 * 2**30, Rates(3e14, 1e13)))
    assert "meta-llama/Llama-2-7b-hf: LlamaForCausalLM, 6.74e9 weights" in text
    assert "2,251 examples of 300 tokens, 4 classes" in text
    assert "| Rows |" in text
    assert (
        "A training: 40,000 examples, 18 min" in text
    )  # 4 * 6.74e9 * 300 * 40,000 / 3e14 operations a second


def test_processes_share_the_seeds(monkeypatch) -> None:
    assert run.share([21, 42, 87]) == [21, 42, 87]
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        shares.append(run.share([21, 42, 87]))
    assert shares == [[21, 87], [42]]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run.own_device("cuda") == "cuda:1"
    assert run.own_device("cpu") == "cpu"


@pytest.mark.parametrize(("dtype", "device_map"), [("bfloat16", None), ("float32", "auto")])
def test_a_model_of_a_folder(tmp_path: Path, dtype: str, device_map: str | None) -> None:
    """As a run loads it: in 16 bits, or spread over the devices that there are."""
    settings = dry.smaller(protocol("winogrande_s"))
    settings = replace(settings, methods=replace(settings.methods, members=1, checkpoints=1))
    base, tokenizer = dry.model(settings)
    base.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    loaded, tokens = load(str(tmp_path / "model"), "cpu", dtype, 0, device_map)
    assert loaded.dtype == getattr(torch, dtype)
    ids = torch.tensor([tokens("During flu season Answer:")["input_ids"]])
    torch.testing.assert_close(loaded(ids).logits.float(), base(ids).logits, atol=0.1, rtol=0.05)
    run.job_of(settings, loaded, tokens, "tiny", str(dry.ROWS), tmp_path / "out").run(21)
    found = json.loads((tmp_path / "out" / "WG-S" / "21.json").read_text())
    assert all("scores" in found["methods"][method] for method in ("MAP", "LA", "ours", "ours, refit"))


def dry_run(monkeypatch, out: Path, name: str, *more: str) -> None:
    arguments = ["run", str(CONFIGS / f"{name}.toml"), "--dry", "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", arguments)
    run.main()


def test_a_dry_run_ends_in_the_table(monkeypatch, tmp_path: Path, capsys) -> None:
    """Two seeds; the first method's figures are those of the adapters in the files; a second run makes nothing."""
    dry_run(monkeypatch, tmp_path, "arc_easy", "--held-out", "0.25")
    (seed, other) = sorted((tmp_path / "ARC-E.held-out-0.25").glob("*.json"))
    found = json.loads(seed.read_text())
    assert list(found["methods"]) == list(METHODS)
    assert found["trained_on"] == 9
    assert all("scores" in facts for facts in found["methods"].values())
    settings = dry.smaller(replace(protocol("arc_easy"), held_out=0.25))
    base, tokenizer = dry.model(settings)
    job = run.job_of(settings, base, tokenizer, "", str(dry.ROWS), tmp_path)
    model = adapted(job.base, settings.lora, 21)
    file = tmp_path / "ARC-E.held-out-0.25" / "adapters" / "21" / "6.safetensors"
    run.restore(model, file)
    right = 0
    for row in job.tests["ARC-E"]:
        right += int(model(torch.tensor([row.ids])).logits[0, -1].argmax()) == row.label
    assert found["methods"]["MAP"]["scores"]["ARC-E"]["ACC"] == pytest.approx(100 * right / 8)
    text = (tmp_path / "table.md").read_text()
    assert "25% of the training rows held out to tune by. Seeds: ARC-E 21, 42." in text
    rows = [line.split(" | ")[:2] for line in text.split("| metric")[1].split("\n\n")[0].splitlines()[2:]]
    assert [method for _, method in rows] == [*METHODS] * len(table.METRICS)
    assert [metric[2:5] for metric, _ in rows[:: len(METHODS)]] == ["ACC", "ECE", "NLL", "Bri"]
    both = [json.loads(each.read_text())["methods"]["LA"]["scores"]["ARC-E"]["NLL"] for each in (seed, other)]
    mean, sd = sum(both) / 2, abs(both[0] - both[1]) / 2**0.5
    assert f"| LA | {mean:.2f} ± {sd:.2f} |" in text
    monkeypatch.setattr(run, "fine_tune", None)
    dry_run(monkeypatch, tmp_path, "arc_easy", "--held-out", "0.25")
    assert "seed" not in capsys.readouterr().out.split("| metric")[1]


@pytest.mark.parametrize("name", [path.stem for path in ROWS if path.stem != "arc_easy"])
def test_every_row_runs(monkeypatch, tmp_path: Path, name: str) -> None:
    found = protocol(name)
    dry_run(monkeypatch, tmp_path, name, "--seeds", str(found.seeds[0]))
    text = (tmp_path / "table.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("| metric")]
    shifted = [f"{found.name} → {source.name}" for source in found.test_sets if source.name != found.name]
    expected = [f"| metric | method | {' | '.join(names)} |" for names in ([found.name], shifted) if names]
    assert headings == expected
    assert "Left out. " in text
    assert "no rows are held out: --held-out" in text
