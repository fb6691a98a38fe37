"""A protocol's configuration: a TOML file, every value of it with its source in a comment."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Prompt:
    """How a question becomes tokens.

    Attributes:
        text: with fields in braces: those of the record, and {choices}.
        answers: what is answered, one token each behind the prompt.
        choice: how one choice is written into {choices}, with {letter} and {text}; they stand a space apart.
        max_length: tokens; more are cut from the right, as tokenizers do.
        space: whether an answer's token is the one with a space before it.
        end_token: whether the token that ends a text closes the prompt.
        most: choices that a question may have; others are left out.
        least: likewise.
        sentences: whether choices begin with a capital and end with a full stop.
    """

    text: str
    answers: list[str]
    max_length: int
    choice: str = "{letter}. {text}"
    space: bool = True
    end_token: bool = False
    most: int = 4
    least: int = 2
    sentences: bool = False


@dataclass(frozen=True)
class Source:
    """Where a set of questions is.

    Attributes:
        name: in the table.
        form: of its records, a name in `records.FORMS`.
        hub: name and configuration, as `datasets.load_dataset` takes them.
        split: of the hub's.
        file: of a folder of local files: JSON lines of the same records.
        examples: how many the published set has, for a plan.
        where: values of fields that a record has to have; a list names several.
        prompt: another prompt text than the protocol's.
    """

    name: str
    form: str
    hub: list[str]
    split: str
    file: str
    examples: int
    where: dict[str, list[Any]] = field(default_factory=dict)
    prompt: str | None = None


@dataclass(frozen=True)
class Lora:
    """Of the adapter; "lm_head" among the targets adapts the rows of the answers alone."""

    r: int
    alpha: int
    dropout: float
    targets: list[str]


@dataclass(frozen=True)
class Train:
    """Of the training: AdamW, a rate that rises over `warmup` of all steps and falls linearly to zero.

    Attributes:
        steps: of the optimiser.
        batch_size: of one pass.
        accumulate: passes a step.
        learning_rate: at its highest.
        weight_decay: of AdamW.
        warmup: share of the steps.
        clip: norm of the gradient; 0 for any.
        order: "shuffled" in every epoch, or a field whose values come in ascending order, once.
        checkpoints: steps from one to the next.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup: float
    clip: float
    order: str
    checkpoints: int
    accumulate: int = 1


@dataclass(frozen=True)
class Methods:
    """Of the methods that are compared.

    Attributes:
        dropout_samples: passes of MC dropout.
        checkpoints: that are averaged, the last one among them.
        members: of a deep ensemble, the model in question among them.
        link_samples: of the published Laplace predictive.
        bins: of the calibration error.
    """

    dropout_samples: int
    checkpoints: int
    members: int
    link_samples: int
    bins: int


@dataclass(frozen=True)
class Protocol:
    """A configuration.

    Attributes:
        name: of the trained set, in tables.
        column: place in tables.
        model: the hub's name of the base model, unless another is given.
        shape: of its configuration, for plans without its files: arguments of transformers' class, "model_type" too.
        seeds: of trainings.
        held_out: share of the training rows, its end, that is held out to tune by; 0 for none.
        train_set: what is trained on.
        test_sets: what is tested on; one in distribution has the protocol's name.
    """

    name: str
    column: int
    model: str
    shape: dict[str, Any]
    seeds: list[int]
    held_out: float
    prompt: Prompt
    lora: Lora
    train: Train
    methods: Methods
    train_set: Source
    test_sets: list[Source]

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must lie in [0, 1), got {self.held_out:g}")
        if len({source.name for source in self.test_sets}) < len(self.test_sets) or not self.test_sets:
            raise ValueError("test_sets must have one or more, with different names")


def read(path: Path) -> Protocol:
    """The protocol of a file, which may extend another one: its values go before.

    Raises:
        ValueError: a field is unknown or missing; names the file and the field.
    """
    raw = _values(path)
    nested: dict[str, Any] = {"prompt": Prompt, "lora": Lora, "train": Train, "methods": Methods}
    try:
        parts = {name: _made(kind, raw.pop(name, {}), name) for name, kind in nested.items()}
        tests = [_made(Source, each, "test_sets") for each in raw.pop("test_sets", [])]
        trained = _made(Source, raw.pop("train_set", {}), "train_set")
        protocol: Protocol = _made(Protocol, raw | parts | {"train_set": trained, "test_sets": tests}, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return protocol


def _values(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        own = tomllib.load(file)
    if "extends" not in own:
        return own
    merged = _values(path.parent / own.pop("extends"))
    for name, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merged[name] | value if both else value
    return merged


def _made(kind: Any, given: Mapping[str, Any], where: str) -> Any:
    known = {each.name: each for each in fields(kind)}
    prefix = f"{where}." if where else ""
    for name in given:
        if name not in known:
            raise ValueError(f"{prefix}{name} is no field: there are {', '.join(known)}")
    for name, each in known.items():
        if name not in given and each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"{prefix}{name} is missing")
    return kind(**given)
