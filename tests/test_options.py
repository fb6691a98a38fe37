"""Options as objects: JSON and back, short names, checks of single values."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from laplace_lora_fast import (
    EKFAC,
    KFAC,
    Answers,
    AnyOf,
    Classes,
    CrossFit,
    Diagonal,
    DirectPreference,
    Evidence,
    HeldOut,
    LaplaceLoRA,
    LeaveOneOut,
    LowRank,
    MonteCarlo,
    MultiLabel,
    Options,
    Outputs,
    Preference,
    Regression,
    Rows,
    Tokens,
)
from laplace_lora_fast.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    PlackettLuce,
    SampledTokens,
)
from laplace_lora_fast.options import from_json, integer, kinds, named, positive_number, short_name, to_json
from laplace_lora_fast.prior.tuning import Tuning
from laplace_lora_fast.structures import Structure
from laplace_lora_fast.tasks import Task
from tests import tiny


def outputs(output: Any, batch: Any) -> torch.Tensor:
    return output.logits


# An example of every kind, no field of which has its default.
EXAMPLES = [
    Answers([5, 11, 7]),
    AnyOf([5, 11]),
    DirectPreference(beta=0.3, ranking=True),
    PlackettLuce(),
    Classes(),
    MultiLabel(),
    Options(score="mean"),
    Preference(ranking=True),
    Regression(noise=0.5, scales=(1.0, 3.0)),
    Tokens(samples=3, likelihood_weight=0.5),
    Bernoulli(),
    Categorical(),
    Gaussian(noise=0.25, scales=(2.0,)),
    SampledTokens(weight=0.5),
    MonteCarlo(samples=3),
    Rows(columns=7, refit=True),
    Rows(fisher=MonteCarlo(2)),
    LowRank(rank=7, columns=9, fisher="empirical"),
    KFAC(tokens="paper", rank=3, factors="sketch", columns=9, fisher=MonteCarlo(2)),
    EKFAC(tokens="expand", rank=2, factors="sketch", columns=5, fisher="empirical"),
    Diagonal(fisher="empirical"),
    Evidence(per="layer"),
    LeaveOneOut(grid=(0.1, 1.0, 10.0), link_approx="mc", n_samples=50),
]
WITH_CODE = [
    Outputs(outputs, Gaussian(noise=0.3)),
    HeldOut([], "side", (1.0, 2.0), "mc", 7, group=object()),
    CrossFit(outputs, [1, 2, 3], 3, outputs, "side", (1.0, 2.0), "mc", 7, seed=1),
]
CODE = {Outputs: ("fn",), HeldOut: ("loader", "group"), CrossFit: ("train", "data", "batches")}


def test_there_is_an_example_of_every_option() -> None:
    known = [kind for kind in kinds(object) if kind.__module__.startswith("laplace_lora_fast.")]
    assert set(known) == {type(option) for option in EXAMPLES + WITH_CODE}
    for kind in known:
        left = {field.name for field in fields(kind) if field.default is not MISSING}
        for option in EXAMPLES + WITH_CODE:
            if type(option) is kind:
                left -= {field.name for field in fields(kind) if getattr(option, field.name) != field.default}
        assert not left, f"the examples of {kind.__name__} leave {left} at its default"


@pytest.mark.parametrize("option", EXAMPLES, ids=repr)
def test_json_and_back(option: Any) -> None:
    text = json.dumps(to_json(option))
    again = from_json(json.loads(text))
    assert type(again) is type(option)
    assert again == option
    assert eval(repr(option)) == option  # the repr is the constructor call


@pytest.mark.parametrize("option", WITH_CODE, ids=lambda option: type(option).__name__)
def test_code_has_no_json(option: Any) -> None:
    name, code = type(option).__name__, CODE[type(option)]
    if name == "Outputs":
        with pytest.raises(TypeError, match=r"Outputs\.fn cannot be saved: function has no JSON form"):
            to_json(option)
    data = json.loads(json.dumps(to_json(option, without=code)))
    assert set(data[name]) == {field.name for field in fields(option)} - set(code)
    with pytest.raises(ValueError, match=f"option {name} does not fit.*{code[0]}"):
        from_json(data)


def object_with(option: Any, **values: Any) -> Any:
    for name, value in values.items():
        object.__setattr__(option, name, value)
    return option


def test_json_names_the_field_that_has_none() -> None:
    with pytest.raises(TypeError, match=r"KFAC\.rank cannot be saved: Tensor has no JSON form"):
        to_json(object_with(KFAC(), rank=torch.ones(2)))
    with pytest.raises(TypeError, match=r"HeldOut\.loader cannot be saved: dict has no JSON form"):
        to_json(HeldOut([{"x": 1}]))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"Dense": {}}, "no option 'Dense' is registered"),
        ({"KFAC": {}, "Rows": {}}, "not the JSON form of an option"),
        ({"KFAC": 3}, "not the JSON form of an option"),
        ({}, "not the JSON form of an option"),
        ({"KFAC": {"mode": "reduce"}}, "option KFAC does not fit.*mode"),
        ({"KFAC": {"tokens": "none"}}, "tokens must be one of"),
        ({"Rows": {"fisher": {"MonteCarlo": {"samples": 0}}}}, "samples must be at least 1"),
        ({"Answers": {"token_ids": [3, 3]}}, "token_ids repeats a token"),
    ],
)
def test_json_that_is_no_option(data: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        from_json(data)


SHORT = {
    Structure: {"rows": Rows(), "kfac": KFAC(), "ekfac": EKFAC(), "diagonal": Diagonal()},
    Task: {"classes": Classes(), "regression": Regression()},
    Tuning: {"evidence": Evidence(), "leave_one_out": LeaveOneOut()},
    Likelihood: {"categorical": Categorical(), "gaussian": Gaussian()},
}


@pytest.mark.parametrize("base", SHORT, ids=lambda base: base.__name__)
def test_short_names(base: type) -> None:
    for name, option in SHORT[base].items():
        found = named("argument", name, base)
        assert type(found) is type(option)
        assert found == option
        assert named("argument", option, base) is option
        assert short_name(type(option)) == name


def test_strings_and_objects_that_are_no_option() -> None:
    with pytest.raises(ValueError, match=r"structure must be one of \[.*'rows'.*\], got 'dual'"):
        named("structure", "dual", Structure)
    with pytest.raises(ValueError, match=r"task='answers' needs arguments: pass Answers\(\.\.\)"):
        named("task", "answers", Task)
    with pytest.raises(TypeError, match=r"task must be one of Answers\(\.\.\), .*got \[5, 11\]"):
        named("task", [5, 11], Task)
    with pytest.raises(TypeError, match=r"structure must be one of .*Rows\(\.\.\)"):
        named("structure", Classes(), Structure)
    with pytest.raises(TypeError, match="structure must be one of"):
        named("structure", Rows, Structure)  # the class, not an object


def test_fisher_by_name() -> None:
    for kind in (Rows, KFAC, EKFAC, Diagonal):
        assert kind(fisher="mc") == kind(fisher=MonteCarlo(1))
        with pytest.raises(ValueError, match="fisher must be one of"):
            kind(fisher="sampled")


def test_options_that_would_not_be_looked_at() -> None:
    """An option lives on the object it belongs to; what is left is refused by name."""
    refused = {
        Rows: ["tokens", "factors"],
        LowRank: ["refit", "tokens"],
        Diagonal: ["tokens", "rank", "factors"],
    }
    for kind, options in refused.items():
        for option in options:
            with pytest.raises(TypeError, match=option):
                kind(**{option: 3})
    for kind in (KFAC, EKFAC):
        with pytest.raises(ValueError, match="leave them out with factors='dense'"):
            kind(factors="dense", columns=8)
    model = tiny.tiny_llama_classifier(3)
    for structure in (Diagonal(), KFAC(factors="dense"), EKFAC(factors="sketch")):
        with pytest.raises(ValueError, match="keeps to no budget: leave it out"):
            LaplaceLoRA(model, Classes(), structure=structure, budget=10**9)


@pytest.mark.parametrize("number", [np.int64, np.int32, torch.tensor, float])
def test_whole_numbers_of_any_type_can_be_saved(number: Callable[[int], Any], tmp_path: Path) -> None:
    structure = KFAC(rank=number(3), columns=number(8), fisher=MonteCarlo(number(2)))
    la = LaplaceLoRA(
        tiny.tiny_llama_classifier(3), Classes(), structure=structure, seed=number(5), budget=number(10**9)
    )
    la.fit([tiny.batch(4)], progress=False).save(tmp_path)
    again = LaplaceLoRA.load(tmp_path, tiny.tiny_llama_classifier(3))
    assert again.structure == KFAC(rank=3, columns=8, fisher=MonteCarlo(2))
    assert (again.seed, again.budget) == (5, 10**9)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda value: Rows(columns=value), "columns"),
        (lambda value: KFAC(rank=value), "rank"),
        (lambda value: KFAC(columns=value), "columns"),
        (lambda value: MonteCarlo(value), "samples"),
        (lambda value: LaplaceLoRA(None, Classes(), seed=value), "seed"),
        (lambda value: LaplaceLoRA(None, Classes(), budget=value), "budget"),
    ],
)
def test_numbers_that_are_not_whole(make: Callable[[Any], Any], name: str) -> None:
    for value in (2.5, "2", float("nan"), [3]):
        with pytest.raises(ValueError, match=rf"{name} must be an integer"):
            make(value)
    if name != "seed":
        for value in (0, -1):
            with pytest.raises(ValueError, match=rf"{name} must be at least 1"):
                make(value)


def test_positive_numbers() -> None:
    for value in (2.5, 3, np.float32(2.5), torch.tensor(2.5)):
        assert type(positive_number("x", value)) is float
    for value in (0, -1.0, float("nan"), float("inf"), "2.5"):
        with pytest.raises(ValueError, match="x must be positive and finite"):
            positive_number("x", value)
    for value in ("two", [1, 2], torch.ones(2), None):
        with pytest.raises(ValueError, match="x must be a number"):
            positive_number("x", value)
    assert integer("x", -3) == -3


def test_rows_with_a_rank_are_low_rank() -> None:
    assert Rows(rank=7, columns=9, fisher="empirical") == LowRank(7, 9, "empirical")
    assert Rows(rank=None) == Rows() == replace(Rows(columns=9), columns=None)
    with pytest.raises(ValueError, match="refit"):
        Rows(rank=7, refit=True)
    with pytest.raises(ValueError, match="rank"):
        Rows(rank=0)
