"""Arguments that are not one of their choices, or would not be looked at, are errors that name the argument."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from laplace_lora_fast import (
    EKFAC,
    KFAC,
    Answers,
    Classes,
    Diagonal,
    Evidence,
    HeldOut,
    LaplaceLoRA,
    LeaveOneOut,
    MonteCarlo,
    NumericalError,
    Outputs,
    Regression,
    Rows,
)
from laplace_lora_fast.likelihoods import Gaussian
from tests import tiny

ANSWERS = Answers(tiny.ANSWERS)


def last_position(output, batch):
    return output.logits[:, -1, :3]


OBJECTS = {
    "one answer": (lambda: Answers([3]), "token_ids must be at least two"),
    "no answers": (lambda: Answers([]), "token_ids must be at least two"),
    "answer twice": (lambda: Answers([3, 5, 3]), r"token_ids repeats.*\[3, 5, 3\]"),
    "answers as strings": (lambda: Answers(["yes", "no"]), "token_ids must be .* integers"),
    "answers as lists": (lambda: Answers([[3], [5]]), "token_ids must be .* integers"),
    "answers of several tokens": (lambda: Answers([[3, 4], [5]]), "token_ids must be .* integers"),
    "answers as floats": (lambda: Answers([3.0, 5.0]), "token_ids must be .* integers"),
    "answers as truth values": (lambda: Answers([True, False]), "token_ids must be .* integers"),
    "one number for answers": (lambda: Answers(3), "token_ids must be at least two"),
    "noise zero": (lambda: Regression(noise=0.0), "noise must be positive"),
    "noise NaN": (lambda: Regression(noise=math.nan), "noise must be positive"),
    "noise infinite": (lambda: Regression(noise=math.inf), "noise must be positive"),
    "noise of text": (lambda: Regression(noise="1"), "noise must be positive"),
    "noise of a likelihood": (lambda: Gaussian(noise=-1), "noise must be positive"),
    "likelihood": (lambda: Outputs(last_position, "softmax"), "likelihood must be one of .*'softmax'"),
    "tokens": (lambda: KFAC(tokens="sum"), "tokens must be one of .*'sum'"),
    "factors": (lambda: KFAC(factors="lowrank"), "factors must be one of .*'lowrank'"),
    "rank": (lambda: KFAC(rank=0), "rank must be at least 1"),
    "rank of a fraction": (lambda: EKFAC(rank=2.5), "rank must be an integer"),
    "columns": (lambda: KFAC(columns=-1), "columns must be at least 1"),
    "columns of dense factors": (lambda: KFAC(factors="dense", columns=8), "columns .*factors='dense'"),
    "columns of rows": (lambda: Rows(columns=0), "columns must be at least 1"),
    "refit": (lambda: Rows(refit="yes"), "refit must be True or False"),
    "refit with a sampled Fisher": (lambda: Rows(refit=True, fisher="mc"), "refit=True needs fisher='exact'"),
    "fisher": (lambda: KFAC(fisher="ggn"), "fisher must be one of .*'ggn'"),
    "fisher of rows": (lambda: Rows(fisher="ggn"), "fisher must be one of .*'ggn'"),
    "fisher of the diagonal": (lambda: Diagonal(fisher=3), "fisher must be one of .*3"),
    "samples": (lambda: MonteCarlo(0), "samples must be at least 1"),
    "per of the evidence": (lambda: Evidence(per="ab"), "per must be one of .*'ab'"),
    "per of held-out data": (lambda: HeldOut([], per="layer"), "per must be one of .*'layer'"),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_objects(name):
    make, match = OBJECTS[name]
    with pytest.raises(ValueError, match=match):
        make()


def test_a_function_of_outputs_has_to_be_one():
    with pytest.raises(TypeError, match="fn must be a function"):
        Outputs("logits")


CONSTRUCTOR = {
    "task": ({"task": "softmax"}, "task must be one of .*'softmax'"),
    "task that needs arguments": ({"task": "answers"}, r"task='answers' needs arguments: pass Answers\(..\)"),
    "answer beyond the vocabulary": ({"task": Answers([3, tiny.VOCAB])}, r"token_ids must lie in \[0, 48\)"),
    "negative answer": ({"task": Answers([3, -1])}, r"token_ids must lie in \[0, 48\)"),
    "structure": ({"structure": "full"}, "structure must be one of .*'full'"),
    "seed": ({"seed": 0.5}, "seed must be an integer"),
    "budget": ({"budget": 0}, "budget must be at least 1"),
    "budget of dense factors": (
        {"structure": KFAC(factors="dense"), "budget": 2**20},
        "KFAC.*no budget",
    ),
    "budget of sketches": ({"structure": EKFAC(factors="sketch"), "budget": 2**20}, "EKFAC.*no budget"),
    "budget of the diagonal": ({"structure": "diagonal", "budget": 2**20}, "Diagonal.*no budget"),
    "layers": ({"layers": "first"}, "layers must be None, 'last'"),
    "prior mean": ({"prior_mean": "nowhere"}, "prior_mean: the folder 'nowhere'"),
}


@pytest.mark.parametrize("name", CONSTRUCTOR)
def test_constructor_arguments(name):
    arguments, match = CONSTRUCTOR[name]
    with pytest.raises(ValueError, match=match):
        LaplaceLoRA(tiny.tiny_llama(), **{"task": ANSWERS} | arguments)


@pytest.mark.parametrize(
    ("argument", "value"), [("task", [3, 5]), ("task", None), ("structure", Rows), ("structure", None)]
)
def test_objects_of_another_kind(argument, value):
    with pytest.raises(TypeError, match=f"{argument} must be one of .*got"):
        LaplaceLoRA(tiny.tiny_llama(), **{"task": ANSWERS} | {argument: value})


def test_budgets_that_are_looked_at():
    for structure in ("auto", "rows", "kfac", "ekfac", Rows(refit=True)):
        assert LaplaceLoRA(tiny.tiny_llama(), ANSWERS, structure=structure, budget=2**20).budget == 2**20


# Prior precision and noise

PRECISIONS = {
    "zero": 0.0,
    "negative": -1.0,
    "NaN": math.nan,
    "infinite": math.inf,
    "missing B": {"A": 1.0},
    "empty": {},
    "unknown key": {"A": 1.0, "B": 1.0, "C": 1.0},
    "unknown layers": {"layer": 1.0},
    "missing layers": {"base_model.model.model.layers.0.self_attn.q_proj": 1.0},
    "negative B": {"A": 1.0, "B": -2.0},
    "text": "high",
    "none in a dict": {"A": 1.0, "B": None},
    "digits": "12",
    "digits in a dict": {"A": 1.0, "B": "2"},
    "below what fp64 can divide by": 1e-310,
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_prior_precisions(name):
    model, value = tiny.tiny_llama(), PRECISIONS[name]
    with pytest.raises(ValueError, match="prior_precision"):
        LaplaceLoRA(model, ANSWERS, prior_precision=value)
    la = LaplaceLoRA(model, ANSWERS, prior_precision=2.0).fit([tiny.batch(3)], progress=False)
    with pytest.raises(ValueError, match="prior_precision"):
        la.prior_precision = value
    for call in (
        lambda: la.predict(tiny.batch(2), prior_precision=value),
        lambda: la.predictions([tiny.batch(2)], prior_precision=value),
        lambda: la.logit_distribution(tiny.batch(2), prior_precision=[1.0, value]),
        lambda: la.log_marginal_likelihood(value),
    ):
        with pytest.raises(ValueError, match="prior_precision"):
            call()
    assert la.prior_precision == 2.0


def test_prior_precisions_that_underflow_are_refused_or_used():
    model = tiny.tiny_llama(torch.float32)
    la = LaplaceLoRA(model, ANSWERS).fit([tiny.batch(3)], progress=False)
    for call in (
        lambda: la.predict(tiny.batch(2), prior_precision=1e-39),
        lambda: LaplaceLoRA(model, ANSWERS, prior_precision={"A": 1.0, "B": 1e-39}),
        lambda: la.optimize_prior_precision(HeldOut([tiny.batch(2)], grid=[1e-45, 1.0])),
    ):
        with pytest.raises(ValueError, match=r"prior_precision must be at least 1\.18e-38"):
            call()
    fp64 = LaplaceLoRA(tiny.tiny_llama(), ANSWERS).fit([tiny.batch(3)], progress=False)
    assert fp64.predict(tiny.batch(2), prior_precision=1e-39).isfinite().all()
    with torch.no_grad():
        for layer in la.layers:
            layer.module.lora_B["default"].weight.mul_(1e6)
    la.fit([tiny.batch(3)], progress=False)
    with pytest.raises(NumericalError, match=r"covariance is not finite in torch.float32: use a larger"):
        la.predict(tiny.batch(2, seed=9), prior_precision=1e-37)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "1"])
def test_noise_is_checked_when_assigned(value):
    la = LaplaceLoRA(tiny.tiny_llama_classifier(1), Regression(noise=0.5))
    with pytest.raises(ValueError, match="sigma_noise"):
        la.sigma_noise = value
    assert la.sigma_noise == 0.5


def test_noise_of_a_classification():
    la = LaplaceLoRA(tiny.tiny_llama(), ANSWERS)
    assert la.sigma_noise is None
    with pytest.raises(ValueError, match=r"Answers.* has no noise"):
        la.sigma_noise = 1.0


# Tuning and predictions


@pytest.fixture(scope="module")
def fitted():
    return LaplaceLoRA(tiny.tiny_llama(), ANSWERS).fit([tiny.batch(6, seed=4)], progress=False)


@pytest.fixture(scope="module")
def regression():
    la = LaplaceLoRA(tiny.tiny_llama_classifier(1), Regression(noise=0.5))
    return la.fit([tiny.batch(6, classes=0)], progress=False)


def held_out(**options):
    return HeldOut([tiny.batch(3)], **options)


TUNING = {
    "name": ("val_nll", "tuning must be one of .*'val_nll'"),
    "held out without a loader": ("held_out", r"tuning='held_out' needs arguments: pass HeldOut\(..\)"),
    "leave one out without a refit": (LeaveOneOut(), r"LeaveOneOut needs structure=Rows\(refit=True\)"),
    "link": (held_out(link_approx="softmax"), "link_approx must be one of .*'softmax'"),
    "link without a posterior": (held_out(link_approx="map"), "link_approx must be one of"),
    "samples of a link that draws none": (held_out(n_samples=10), "n_samples has no effect on .*'probit'"),
    "samples": (held_out(link_approx="mc", n_samples=0), "n_samples must be at least 1"),
    "grid of one": (held_out(grid=[1.0]), "grid must hold at least two ascending"),
    "empty grid": (held_out(grid=[]), "grid must hold at least two ascending"),
    "grid descending": (held_out(grid=[2.0, 1.0]), "grid must hold at least two ascending"),
    "grid with a repeat": (held_out(grid=[1.0, 1.0]), "grid must hold at least two ascending"),
    "grid from zero": (held_out(grid=[0.0, 1.0]), "grid must hold at least two ascending"),
    "grid with NaN": (held_out(grid=[1.0, math.nan]), "grid must hold at least two ascending"),
    "grid with NaN inside": (held_out(grid=[0.1, math.nan, 10.0]), "grid must hold at least two ascending"),
    "grid to infinity": (held_out(grid=[1.0, math.inf]), "grid must hold at least two ascending"),
}


@pytest.mark.parametrize("name", TUNING)
def test_tuning(fitted, name):
    tuning, match = TUNING[name]
    with pytest.raises(ValueError, match=match):
        fitted.optimize_prior_precision(tuning, progress=False)
    assert fitted.prior_precision == 1.0


def test_tuning_of_another_kind(fitted):
    with pytest.raises(TypeError, match=r"tuning must be one of .*HeldOut\(..\)"):
        fitted.optimize_prior_precision([tiny.batch(3)])


def test_a_refit_has_one_prior_precision():
    la = LaplaceLoRA(tiny.tiny_llama(), ANSWERS, structure=Rows(refit=True))
    la.fit([tiny.batch(6)], progress=False)
    with pytest.raises(ValueError, match="per='all'"):
        la.optimize_prior_precision(Evidence(per="side"))
    assert la.prior_precision == 1.0


LEAVE_ONE_OUT = {
    "link": (LeaveOneOut(link_approx="map"), "link_approx must be one of"),
    "samples of a link that draws none": (LeaveOneOut(n_samples=10), "n_samples has no effect"),
    "grid of one": (LeaveOneOut(grid=[1.0]), "grid must hold at least two ascending"),
}


@pytest.mark.parametrize("name", LEAVE_ONE_OUT)
def test_leave_one_out(name):
    tuning, match = LEAVE_ONE_OUT[name]
    la = LaplaceLoRA(tiny.tiny_llama(), ANSWERS, structure=Rows(refit=True))
    with pytest.raises(ValueError, match=match):
        la.fit([tiny.batch(6)], progress=False).optimize_prior_precision(tuning, progress=False)


def test_links(fitted):
    for call in (fitted.predict, fitted.logit_distribution):
        with pytest.raises(ValueError, match="prior_precision is an empty list"):
            call(tiny.batch(2), prior_precision=[])
    for predict in (
        lambda **options: fitted.predict(tiny.batch(2), **options),
        lambda **options: fitted.predictions([tiny.batch(2)], progress=False, **options),
    ):
        for link in ("softmax", "", 3):
            with pytest.raises(ValueError, match="link_approx must be one of"):
                predict(link_approx=link)
        for n_samples in (0, -1):
            with pytest.raises(ValueError, match="n_samples must be at least 1"):
                predict(link_approx="mc", n_samples=n_samples)
        for link in (None, "probit", "bridge", "map"):
            with pytest.raises(ValueError, match="n_samples has no effect"):
                predict(link_approx=link, n_samples=10)


def test_a_regression_has_no_link(regression):
    batch = tiny.batch(3, classes=0)
    for options in ({"link_approx": "probit"}, {"link_approx": "map"}, {"n_samples": 10}):
        for call in (
            lambda: regression.predict(batch, **options),  # noqa: B023
            lambda: regression.predictions([batch], progress=False, **options),  # noqa: B023
            lambda: regression.optimize_prior_precision(HeldOut([batch], **options), progress=False),  # noqa: B023
        ):
            with pytest.raises(ValueError, match="no link: leave out link_approx and n_samples"):
                call()


def test_a_classification_has_no_variance(fitted):
    with pytest.raises(ValueError, match="predicts probabilities"):
        fitted.predictive_variance(tiny.batch(2))


def test_what_only_some_structures_have():
    batch = [tiny.batch(4)]
    rows = LaplaceLoRA(tiny.tiny_llama(), ANSWERS, structure="rows").fit(batch, progress=False)
    with pytest.raises(ValueError, match=r"no Kronecker factors: fit with KFAC\(\)"):
        _ = rows.factors
    diagonal = LaplaceLoRA(tiny.tiny_llama(), Outputs(last_position), structure="diagonal")
    with pytest.raises(ValueError, match=r"no Kronecker factors: fit with KFAC\(\)"):
        _ = diagonal.fit(batch, progress=False).factors
    assert LaplaceLoRA(tiny.tiny_llama_classifier(3), "classes").task == Classes()


def test_a_misspelt_argument_is_named_with_the_nearest():
    model = tiny.tiny_llama()
    for call, message in (
        (
            lambda: LaplaceLoRA(model, ANSWERS, structur="kfac"),
            "LaplaceLoRA has no argument 'structur': did you mean 'structure'",
        ),
        (
            lambda: LaplaceLoRA(model, ANSWERS, prior=1.0),
            "LaplaceLoRA has no argument 'prior': did you mean 'prior_",
        ),
        (lambda: LaplaceLoRA(model, ANSWERS, xyz=1), "'xyz': it takes model, task, structure"),
        (lambda: LaplaceLoRA(model), "LaplaceLoRA: missing a required argument: 'task'"),
        (lambda: LaplaceLoRA(model, ANSWERS, "kfac"), "LaplaceLoRA: too many positional arguments"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    assert list(inspect.signature(LaplaceLoRA).parameters)[:3] == ["model", "task", "structure"]
