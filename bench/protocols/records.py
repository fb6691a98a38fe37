"""Records of published sets as questions, from local files or a hub, and questions as prompts."""

from __future__ import annotations

import hashlib
import json
import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.protocols.config import Prompt, Source

Record = Mapping[str, Any]
HUB = "hub"


@dataclass(frozen=True)
class Question:
    """A record in one form.

    Attributes:
        fields: what a prompt may name.
        choices: texts to choose from, in the order of the answers.
        label: place of the right one.
    """

    fields: dict[str, Any]
    choices: list[str]
    label: int


def _lettered(record: Record) -> Question | None:
    """ARC and OpenBookQA: choices with labels of their own, letters or numbers."""
    question = record.get("question", record.get("question_stem"))
    labels, texts = record["choices"]["label"], record["choices"]["text"]
    return Question({"question": question}, list(texts), list(labels).index(record["answerKey"]))


def _winogrande(record: Record) -> Question | None:
    if not record["answer"]:
        return None  # the unlabelled test split
    options = {name: record[name] for name in ("option1", "option2")}
    return Question(
        {"question": record["sentence"], **options}, list(options.values()), int(record["answer"]) - 1
    )


def _boolq(record: Record) -> Question | None:
    label = int(record["answer"] if "answer" in record else record["label"])
    names = ("question", "passage")
    return Question({name: record[name] for name in names}, ["False", "True"], label) if label >= 0 else None


def _mmlu(record: Record) -> Question | None:
    return Question({"question": record["question"]}, list(record["choices"]), int(record["answer"]))


def _scienceqa(record: Record) -> Question | None:
    choices = [str(choice).strip() for choice in record["choices"] if str(choice).strip()]
    fields = {"question": record["question"], "grade": int(str(record["grade"]).removeprefix("grade"))}
    return Question(fields, choices, int(record["answer"]))


def _gpqa(record: Record) -> Question | None:
    """The right choice at a place that the question's text decides."""
    texts = [record[f"Incorrect Answer {n}"] for n in (1, 2, 3)] + [record["Correct Answer"]]
    order = list(range(4))
    random.Random(hashlib.sha256(record["Question"].encode()).digest()).shuffle(order)
    return Question({"question": record["Question"]}, [texts[n] for n in order], order.index(3))


FORMS: dict[str, Callable[[Record], Question | None]] = {
    "lettered": _lettered,
    "winogrande": _winogrande,
    "boolq": _boolq,
    "mmlu": _mmlu,
    "scienceqa": _scienceqa,
    "gpqa": _gpqa,
}


def questions(source: Source, data: str, prompt: Prompt) -> list[Question]:
    """The questions of a set.

    Args:
        source: the set.
        data: a folder of local files, or "hub".
        prompt: says how many choices a question may have.

    Raises:
        ImportError: the hub is asked for and `datasets` is not installed.
        ValueError: a record has another form; names the set and the record.
    """
    found = []
    for number, record in enumerate(_records(source, data), 1):
        if any(record.get(name) not in values for name, values in source.where.items()):
            continue
        try:
            question = FORMS[source.form](record)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{source.name}: record {number} is none of form {source.form!r}: {error!r}"
            ) from error
        if question is not None and prompt.least <= len(question.choices) <= prompt.most:
            found.append(question)
    if not found:
        raise ValueError(f"{source.name}: no record is left of {data}")
    return found


def _records(source: Source, data: str) -> Sequence[Record]:
    if data == HUB:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ImportError('--data hub needs datasets: pip install ".[protocols]"') from error
        return load_dataset(*source.hub, split=source.split)  # type: ignore[no-any-return]
    file = Path(data) / source.file
    if not file.exists():
        raise FileNotFoundError(
            f"{file} does not exist: it should hold the records of {source.name}, a line each"
        )
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def text_of(question: Question, prompt: Prompt, text: str | None = None) -> str:
    """The prompt of a question, by another text than the protocol's where one is given."""
    choices = [_sentence(choice) if prompt.sentences else choice for choice in question.choices]
    lettered = zip(string.ascii_uppercase, choices, strict=False)
    listed = " ".join(prompt.choice.format(letter=letter, text=choice) for letter, choice in lettered)
    return (text or prompt.text).format(**question.fields, choices=listed)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"
