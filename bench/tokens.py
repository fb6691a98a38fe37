"""What text costs on a real model, in units of plain passes: fits of `Options` and `Tokens`, scores, generation.

    python -m bench.tokens        # some minutes on one core; writes bench/results/tokens.json and tokens.md

Times are CPU seconds of this process, methods and their floors in turns; ratios are medians over rounds.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.answers.models import option_scores
from laplace_lora_fast import KFAC, LaplaceLoRA, Options, Rows, Tokens
from laplace_lora_fast.data import option_batches_from_ids
from laplace_lora_fast.demo.task import Recipe, add_adapter, load_examples, load_model
from laplace_lora_fast.evaluation.provenance import provenance

RESULTS = Path(__file__).parent / "results"
TEXTS, LENGTH, BATCHES, LABELS, SAMPLES, NEW, ROUNDS = 2, 24, 4, 4, 8, 12, 1
CHOICES, OPTION = 4, 4  # options of a text, tokens of each: its last ones
OPTION_BATCHES = 16  # of an epoch: a fit passes its first batch two times more, to see how large it is


@dataclass(frozen=True)
class Cost:
    """What a method costs.

    Attributes:
        method: its name.
        floor: what its time is divided by.
        ratio: median over rounds.
        bound: what it is not to exceed.
    """

    method: str
    floor: str
    ratio: float
    bound: float


def seconds(job: Callable[[], Any]) -> float:
    """CPU time of a call."""
    start = time.process_time()
    job()
    return time.process_time() - start


def in_turns(job: Callable[[], Any], floor: Callable[[], Any]) -> float:
    """Median ratio of the two, after a round that does not count."""
    ratios = []
    for number in range(ROUNDS + 1):
        below = seconds(floor)
        ratio = seconds(job) / below
        if number:
            ratios.append(ratio)
    return statistics.median(ratios)


def main() -> None:
    """Measures and writes."""
    base, tokenizer = load_model()
    model = add_adapter(base, Recipe()).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # as after training: zeros would make half of the derivatives vanish
            with torch.no_grad():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    texts = [row.prompt for row in load_examples("movie_reviews.train")[:200]]
    longest = [ids[:LENGTH] for ids in (tokenizer(text)["input_ids"] for text in texts) if len(ids) >= LENGTH]
    ids = torch.tensor(longest[:TEXTS])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def training_steps() -> None:
        for _ in range(BATCHES):
            model(**batch).loss.backward()
            model.zero_grad(set_to_none=True)

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False)

    def plain_generation() -> None:
        x, cache = ids[:1].repeat(SAMPLES, 1), None
        with torch.no_grad():
            for _ in range(NEW):
                output = model(input_ids=x, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, x = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)

    costs, fitted = [options_cost(model, longest)], None
    passes = (1 + LABELS) * 1.25
    for structure in (Rows(), KFAC(tokens="expand")):
        la = LaplaceLoRA(model, Tokens(samples=LABELS), structure=structure, prior_precision=100.0)
        ratio = in_turns(lambda la=la: la.fit([batch] * BATCHES, progress=False), training_steps)  # type: ignore[misc]
        costs.append(
            Cost(f"fit, {LABELS} label samples, {structure}", "an epoch of training steps", ratio, passes)
        )
        fitted = fitted or la
    assert fitted is not None
    ratio = in_turns(lambda: fitted.token_uncertainty(batch, n_samples=SAMPLES), forward)
    costs.append(Cost(f"token_uncertainty, {SAMPLES} samples", "a forward pass", ratio, 2.0 * SAMPLES + 1))
    options: dict[str, Any] = {"n_samples": SAMPLES, "max_new_tokens": NEW, "eos_token_id": []}
    ratio = in_turns(lambda: fitted.generate({"input_ids": ids[:1]}, **options), plain_generation)
    costs.append(Cost(f"generate, {SAMPLES} samples", f"plain generation of {SAMPLES} rows", ratio, 4.5))
    write(costs)


def options_cost(model: torch.nn.Module, texts: list[list[int]]) -> Cost:
    """Of a fit to texts whose last tokens are one of several options, the others the last tokens of other texts."""
    ends = [text[-OPTION:] for text in texts]
    examples = [
        (text[:-OPTION], [ends[place], *(ends[:place] + ends[place + 1 :])[: CHOICES - 1]], 0)
        for place, text in enumerate(texts[:TEXTS])
    ]
    (batch,) = option_batches_from_ids(examples, TEXTS)

    def training_steps() -> None:
        for _ in range(OPTION_BATCHES):
            scores = option_scores(model, batch).view(TEXTS, CHOICES)
            torch.nn.functional.cross_entropy(scores, batch["labels"]).backward()
            model.zero_grad(set_to_none=True)

    la = LaplaceLoRA(model, Options(), structure=Rows(), prior_precision=100.0)
    ratio = in_turns(lambda: la.fit([batch] * OPTION_BATCHES, progress=False), training_steps)
    method = f"fit, {CHOICES} options of {OPTION} tokens, {la.structure}"
    return Cost(method, "an epoch of training steps", ratio, 1.25)


def write(costs: list[Cost]) -> None:
    """The results as JSON and as a table."""
    setting = {"texts": TEXTS, "tokens": LENGTH, "batches": BATCHES, "new_tokens": NEW, "rounds": ROUNDS}
    record = {
        **provenance(("torch", "transformers", "peft")),
        "setting": setting,
        "costs": [asdict(cost) for cost in costs],
    }
    (RESULTS / "tokens.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    lines = [
        "# Text: what it costs",
        "",
        f"SmolLM2-135M, fp32, {TEXTS} texts of {LENGTH} tokens a batch, fits on {BATCHES} batches, "
        f"of options {OPTION_BATCHES}, their end included; answers of {NEW} tokens; "
        f"CPU time, median of {ROUNDS} round(s) after one that does not count; "
        "`python -m bench.tokens`.",
        "",
        "| method | in units of | ratio | not to exceed |",
        "|---|---|---|---|",
        *(f"| {c.method} | {c.floor} | {c.ratio:.2f} | {c.bound:.2f} |" for c in costs),
    ]
    (RESULTS / "tokens.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
