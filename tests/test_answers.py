"""The scripts that measure options, rewards and generated answers, on tiny models."""

from __future__ import annotations

import json
import random

import peft
import pytest
import torch
import transformers

from bench import generation
from bench.answers import data, models, report
from bench.answers.compare import LEFT_OUT, MAP, TEMPERATURE, compared
from laplace_lora_fast import LaplaceLoRA, Options, Rows, Tokens
from laplace_lora_fast.data import option_batches
from laplace_lora_fast.data.texts import text_batches
from tests import tiny, words

pytestmark = pytest.mark.filterwarnings("ignore::laplace_lora_fast.errors.LaplaceWarning")


def tokenizer():
    found = words.tokenizer()
    found.eos_token = found.pad_token = "negative"
    return found


def rows(count: int, seed: int):
    found = words.rows(count, seed, ("film", "plot the", "good"))
    for row in found:
        row["label"] = int("good" in row["prompt"])
    return found


def test_layers_below_are_run_once_and_change_nothing():
    def model(split: bool):
        base, layers = words.base_model(), [1]
        known: dict = {}
        if split:
            base, layers = models.split_below(base, 1, known), [0]
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=layers)
        found = peft.get_peft_model(base, config)
        tiny.randomise(found, seed=3)
        return found.eval(), known

    (whole, _), (upper, known) = model(False), model(True)
    batches = option_batches(tokenizer(), rows(6, 0), 3)
    for batch in batches:
        torch.testing.assert_close(models.option_scores(upper, batch), models.option_scores(whole, batch))
    count = len(known)
    assert count == sum(len(batch["group"]) for batch in batches)
    models.option_scores(upper, option_batches(tokenizer(), rows(6, 0), 6)[0])
    assert len(known) == count


def test_layers_of_several_kinds_keep_theirs_where_the_lower_ones_are_split_off():
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=3,
        layer_types=kinds,
    )
    torch.manual_seed(0)
    whole = transformers.Gemma3ForCausalLM(config).double().eval()
    ids = torch.randint(1, 32, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = whole(input_ids=ids).logits
    upper = models.split_below(whole, 2, {})
    torch.testing.assert_close(upper(input_ids=ids, use_cache=False).logits, expected)


def test_option_scores_are_the_tasks():
    model = models.adapted(words.base_model(), 0)
    (batch,) = option_batches(tokenizer(), rows(4, 1), 4)
    la = LaplaceLoRA(model.eval(), Options(), structure=Rows()).fit([batch], progress=False)
    u = models.option_scores(model, batch)
    expected = torch.stack([u[batch["group"] == i].softmax(0) for i in range(4)])
    torch.testing.assert_close(la.predict(batch, link_approx="map").float(), expected)


def test_methods_are_compared_and_drawn(tmp_path):
    folder = tmp_path / "answers"
    folder.mkdir()
    for seed in (0, 1):
        model = models.adapted(words.base_model(), seed)
        train, held_out, test = (
            option_batches(tokenizer(), rows(n, s), 4) for n, s in ((12, seed), (8, 7), (16, 8))
        )
        loss = models.fine_tune(model, train, models.option_scores, 2, 1e-2, seed)
        found, _ = compared(model, Options(), train, held_out, {"one": test})
        found["cpu_seconds"]["train"] = 0.0
        setting = {"train": 12, "held_out": 8, "test": 16, "epochs": 2, "rate": 0.01, "tokens": 9, "top": 0}
        about = {"model": "tiny", "seed": seed, "setting": setting, "loss": loss, "layers": 2}
        about["environment"] = {"machine": "a machine", "date": "today"}
        (folder / f"options.tiny.{seed}.json").write_text(json.dumps(about | found))
    report.draw(tmp_path)
    found = json.loads((tmp_path / "answers-options.json").read_text())["tiny"]["tests"]["one"]
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]

    def nll(run, method):
        p = torch.tensor(run["probs"]["one"][method])
        return -p.gather(1, torch.tensor(run["labels"]["one"])[:, None]).log()[:, 0]

    apart = torch.stack([nll(run, LEFT_OUT) - nll(run, TEMPERATURE) for run in runs]).mean()
    value, low, high = found[LEFT_OUT]["nll_difference"]
    assert value == pytest.approx(float(apart), abs=1e-5)
    assert low <= value <= high
    assert found[MAP]["ece_difference"][0] == pytest.approx(found[MAP]["ece"] - found[TEMPERATURE]["ece"])
    assert found[MAP]["nll"] == pytest.approx(
        float(torch.stack([nll(r, MAP).mean() for r in runs]).mean()), 1e-4
    )
    (row,) = (
        line
        for line in (tmp_path / "answers-options.md").read_text().splitlines()
        if line.startswith(f"| {MAP} |")
    )
    assert f"| {MAP} | {found[MAP]['accuracy']:.3f} |" in row
    assert f"| {found[MAP]['nll']:.3f} |" in row


def test_what_is_picked_is_drawn():
    rules = {rule: [1.0, 2.0] for rule in report.RULES} | {"lower bound, k = 1": [2.0, 3.5]}
    found = report._picked([rules, rules])
    assert found["mean"] == 1.5
    assert found["difference"][0] == pytest.approx(1.25)
    assert report._best_of({"a posterior": {"texts": found}})[-1].startswith(
        "| texts | a posterior | 1.500 | 2.750 |"
    )


def test_pairs_prefer_the_better_rated():
    texts = [
        (f"text {i}", float(rating)) for i, rating in enumerate(random.Random(0).choices(range(5), k=40))
    ]
    ratings = dict(texts)
    assert len(data.pairs(texts, 100, 0, times=2)) > len(data.pairs(texts, 100, 0))
    found = data.pairs(texts, 100, 0)
    assert found
    assert all(ratings[row["chosen"]] - ratings[row["rejected"]] >= 1 for row in found)
    seen = [text for row in found for text in row.values()]
    assert len(seen) == len(set(seen))


def test_fewer_short_questions_than_asked_for_are_an_error(monkeypatch):
    rows = [{"prompt": f"the film {n}", "choices": ["good", "dull"], "label": 0} for n in range(5)]
    monkeypatch.setattr(data, "arc_rows", lambda folder, split: rows if split == "train" else rows[:0])
    with pytest.raises(ValueError, match="5 train questions have at most 50 tokens, 6 are asked for"):
        data.arc_parts(tokenizer(), None, (4, 2, 0), 50, 0)
    train, held_out, test = data.arc_parts(tokenizer(), None, (3, 2, 0), 50, 0)
    assert (len(train), len(held_out), test) == (3, 2, [])


def test_answers_are_scored_in_the_prompts_order(monkeypatch, tmp_path):
    encoder = transformers.BertConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertModel(encoder).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(generation, "encoder_folder", lambda: tmp_path)
    tokens, model = tokenizer(), models.adapted(words.base_model(), 0)
    train = text_batches(tokens, [row | {"completion": "plot"} for row in words.rows(8, 0)], 4)
    assert generation.fine_tune(model, train, 2, 1e-2) > 0
    la = LaplaceLoRA(model, Tokens(samples=2), structure=Rows(), prior_precision=10.0).fit(
        train, progress=False
    )
    judge = generation.Judge(la, tokens, 2)
    prompts = ["the film good fine", "bad", "a plot dull"]
    torch.manual_seed(0)
    together = judge.scores(prompts)
    kinds = (
        "-log p of the answer",
        "gradient norm",
        "variance of log p, closed form",
        "mutual information, sum",
    )
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = judge.scores([prompt])
        assert alone["answer"] == found["answer"]
        for kind in kinds:
            assert alone["scores"][kind] == pytest.approx(found["scores"][kind], rel=1e-3)
    assert together[1]["scores"]["prompt's length"] == 1


def test_an_answer_is_right_by_its_words():
    row = {"choices": ["the red planet", "the sun"], "label": 0}
    assert generation.right("A red planet.", row)
    assert not generation.right("the sun", row)
    assert not generation.right("water", row)


def test_separation_has_its_interval():
    value, low, high = generation.separation(torch.arange(20.0), torch.arange(10.0, 30.0))
    assert low < value < high
    assert value == pytest.approx(0.875)
