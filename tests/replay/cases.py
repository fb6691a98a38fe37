"""What is replayed: tiny fp64 models, fits of every structure on them, and all that is asked of each fit.

`quantities` computes a case's numbers from the public interface alone; `test_replay` compares them with frozen ones.
Every case is a problem (model, task, data) times a structure, or an integration with another library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

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
    Outputs,
    Regression,
    Rows,
)
from laplace_lora_fast.likelihoods import Gaussian
from tests import tiny

Quantities = dict[str, Tensor]

RANK = 3
GRID = tuple(10.0**exponent for exponent in range(-3, 4))
TWO_PRIORS = [0.3, {"A": 2.0, "B": 0.5}]
BATCH = 3


@dataclass(frozen=True)
class Problem:
    """A model, its task, and data for it.

    Attributes:
        model: makes it, in fp64.
        task: makes it.
        padding: the side of the pads.
        regression: labels are [N, 2] reals; otherwise three classes.
    """

    model: Callable[[], nn.Module]
    task: Callable[[], Any]
    padding: str = "left"
    regression: bool = False

    def data(self, n: int, seed: int) -> tiny.Batch:
        data = tiny.batch(n, length=6, seed=seed, padding=self.padding)
        if self.regression:
            generator = torch.Generator().manual_seed(seed)
            data["labels"] = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return data

    @property
    def train(self) -> list[tiny.Batch]:
        return tiny.split(self.data(8, seed=6), BATCH)

    @property
    def validation(self) -> list[tiny.Batch]:
        return tiny.split(self.data(6, seed=2), BATCH)

    @property
    def test(self) -> tiny.Batch:
        data = self.data(3, seed=3)
        del data["labels"]
        return data


def llama(*targets: str) -> Callable[[], nn.Module]:
    return lambda: tiny.tiny_llama(targets=targets, r=RANK)


def llama_regressor() -> nn.Module:
    return tiny.tiny_llama_classifier(2, r=RANK)


def last_position(outputs: int) -> Callable[[Any, Mapping[str, Any]], Tensor]:
    return lambda output, batch: output.logits[:, -1, :outputs]


def answers() -> Answers:
    return Answers(tiny.ANSWERS)


DECODER = Problem(llama("q_proj", "v_proj"), answers)
SHARED = Problem(llama("q_proj", "k_proj", "v_proj"), answers)  # three layers of one input
HEAD = Problem(llama("v_proj", "lm_head"), answers)
CONV1D = Problem(lambda: tiny.tiny_gpt2(r=RANK), answers)
ENCODER = Problem(lambda: tiny.tiny_bert_classifier(3, r=RANK), Classes, padding="right")
OUTPUTS = Problem(llama("q_proj", "v_proj"), lambda: Outputs(last_position(3)))
REGRESSION = Problem(llama_regressor, lambda: Regression(noise=0.6), padding="right", regression=True)
REGRESSION_OUTPUTS = Problem(
    llama("q_proj", "v_proj"), lambda: Outputs(last_position(2), Gaussian(noise=0.6)), regression=True
)
NOISE_TUNED = Problem(llama_regressor, Regression, padding="right", regression=True)


@dataclass(frozen=True)
class Case:
    """A fit of a problem.

    Attributes:
        problem: what is fitted.
        structure: of the curvature.
        options: other arguments of LaplaceLoRA.
        tune_noise: how the prior precision and the noise are tuned together, before anything else is asked.
    """

    problem: Problem
    structure: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    tune_noise: Evidence | None = None

    @property
    def refitted(self) -> bool:
        """There are no weights to sample then, and the training examples can be left out one by one."""
        return isinstance(self.structure, Rows) and self.structure.refit


def start_of_training(model: nn.Module, zero_b: bool = False) -> Quantities:
    """An adapter that `prior_mean` takes."""
    tiny.randomise(model, seed=5)
    adapter = peft.get_peft_model_state_dict(model)
    return {name: 0 * weight if zero_b and "lora_B" in name else weight for name, weight in adapter.items()}


LAYERWISE = {
    f"base_model.model.model.layers.{layer}.self_attn.{name}_proj": 0.5 + layer + (name == "v")
    for layer in (0, 1)
    for name in "qv"
}
CENTRED = {"prior_mean": start_of_training(DECODER.model())}
CENTRED_AT_BASE = {"prior_mean": start_of_training(DECODER.model(), zero_b=True)}

FITS = {
    "decoder-rows": Case(DECODER, Rows()),
    "decoder-rows-columns": Case(DECODER, Rows(columns=8)),
    "decoder-rows-mc": Case(DECODER, Rows(fisher=MonteCarlo(2))),
    "decoder-rows-empirical": Case(DECODER, Rows(columns=8, fisher="empirical")),
    "decoder-rows-last": Case(DECODER, Rows(), {"layers": "last"}),
    "decoder-rows-prior-mean": Case(DECODER, Rows(), CENTRED | {"prior_precision": {"A": 0.3, "B": 2.0}}),
    "decoder-rows-layerwise": Case(DECODER, Rows(), {"prior_precision": LAYERWISE}),
    "decoder-rows-seed": Case(DECODER, Rows(columns=8, fisher="mc"), {"seed": 7}),
    "decoder-refit": Case(DECODER, Rows(refit=True)),
    "decoder-refit-columns": Case(
        DECODER, Rows(columns=8, refit=True), {"prior_precision": {"A": 0.3, "B": 2.0}}
    ),
    "decoder-refit-prior-mean": Case(DECODER, Rows(refit=True), CENTRED_AT_BASE),
    "decoder-kfac": Case(DECODER, KFAC()),
    "decoder-kfac-expand": Case(DECODER, KFAC(tokens="expand")),
    "decoder-kfac-paper": Case(DECODER, KFAC(tokens="paper")),
    "decoder-kfac-rank": Case(DECODER, KFAC(factors="dense", rank=3)),
    "decoder-kfac-sketch": Case(DECODER, KFAC(factors="sketch", columns=8)),
    "decoder-kfac-expand-sketch-rank": Case(
        DECODER, KFAC(tokens="expand", factors="sketch", columns=8, rank=5)
    ),
    # The factors of v's outputs are dense, the rest are sketched.
    "decoder-kfac-budget": Case(DECODER, KFAC(columns=8), {"budget": 2500}),
    "decoder-kfac-mc": Case(DECODER, KFAC(tokens="expand", fisher=MonteCarlo(2))),
    "decoder-kfac-empirical": Case(DECODER, KFAC(fisher="empirical")),
    "decoder-kfac-last": Case(DECODER, KFAC(), {"layers": "last"}),
    "decoder-kfac-prior-mean": Case(DECODER, KFAC(), CENTRED | {"prior_precision": {"A": 0.3, "B": 2.0}}),
    "decoder-kfac-layerwise": Case(DECODER, KFAC(), {"prior_precision": LAYERWISE}),
    "decoder-ekfac": Case(DECODER, EKFAC()),
    "decoder-ekfac-expand-sketch": Case(DECODER, EKFAC(tokens="expand", factors="sketch", columns=8, rank=5)),
    "decoder-ekfac-empirical": Case(DECODER, EKFAC(rank=3, fisher="empirical")),
    "decoder-diagonal": Case(DECODER, Diagonal()),
    "decoder-diagonal-mc": Case(DECODER, Diagonal(fisher=MonteCarlo(2))),
    "decoder-auto": Case(DECODER, "auto"),  # becomes Rows
    "decoder-auto-budget": Case(DECODER, "auto", {"budget": 10_000}),  # becomes KFAC
    "shared-rows": Case(SHARED, Rows()),
    "shared-kfac": Case(SHARED, KFAC()),
    "shared-ekfac": Case(SHARED, EKFAC(tokens="expand")),
    "head-rows": Case(HEAD, Rows()),
    "head-kfac": Case(HEAD, KFAC()),
    "head-kfac-last": Case(HEAD, KFAC(tokens="expand"), {"layers": "last"}),
    "conv1d-rows": Case(CONV1D, Rows()),
    "conv1d-kfac": Case(CONV1D, KFAC(tokens="expand")),
    "conv1d-diagonal": Case(CONV1D, Diagonal()),
    "encoder-rows": Case(ENCODER, Rows()),
    "encoder-refit": Case(ENCODER, Rows(refit=True)),
    "encoder-kfac": Case(ENCODER, KFAC(tokens="expand")),
    "encoder-ekfac": Case(ENCODER, EKFAC()),
    "encoder-diagonal": Case(ENCODER, Diagonal()),
    "outputs-rows": Case(OUTPUTS, Rows()),
    "outputs-kfac-paper": Case(OUTPUTS, KFAC(tokens="paper")),
    "regression-rows": Case(REGRESSION, Rows()),
    "regression-refit": Case(REGRESSION, Rows(columns=8, refit=True)),
    "regression-kfac": Case(REGRESSION, KFAC()),
    "regression-kfac-mc": Case(REGRESSION, KFAC(tokens="expand", fisher=MonteCarlo(2))),
    "regression-ekfac": Case(REGRESSION, EKFAC()),
    "regression-diagonal": Case(REGRESSION, Diagonal(fisher="empirical")),
    "regression-auto": Case(REGRESSION, "auto"),
    "regression-outputs-rows": Case(REGRESSION_OUTPUTS, Rows()),
    "regression-outputs-kfac": Case(REGRESSION_OUTPUTS, KFAC(tokens="expand")),
    "noise-rows": Case(NOISE_TUNED, Rows(), tune_noise=Evidence()),
    "noise-rows-side": Case(NOISE_TUNED, Rows(), tune_noise=Evidence(per="side")),
    "noise-kfac": Case(NOISE_TUNED, KFAC(), tune_noise=Evidence()),
    "noise-kfac-layer": Case(NOISE_TUNED, KFAC(), tune_noise=Evidence(per="layer")),
}


def quantities(case: Case, folder: Path) -> Quantities:
    """All that is asked of a fit. `folder`: an empty one, for samples."""
    problem = case.problem
    options = {"prior_precision": 0.7} | case.options
    la = LaplaceLoRA(problem.model(), problem.task(), structure=case.structure, **options)
    la.fit(problem.train, progress=False)
    found = {}
    if case.tune_noise is not None:
        found["tuned"] = as_tensor(la.optimize_prior_precision(case.tune_noise, progress=False))
        found["noise"] = as_tensor(la.sigma_noise)
    found |= of_posterior(la)
    if type(case.structure) is KFAC:
        found |= of_factors(la)
    found |= of_logits(la, problem.test)
    found |= (of_regression if problem.regression else of_classification)(la, problem)
    if not case.refitted:
        found["samples"] = samples(la, folder)
    if case.tune_noise is None:
        found |= of_tuning(la, case)
    return found


def of_posterior(la: LaplaceLoRA) -> Quantities:
    posterior, last = la.posterior, la.layers[-1].name
    return {
        "log_marginal_likelihood": la.log_marginal_likelihood(),
        "log_marginal_likelihood-other": la.log_marginal_likelihood(prior_precision=TWO_PRIORS[1]),
        "log_det_ratio": posterior.log_det_ratio(),
        "effective_parameters": posterior.effective_parameters(),
        "covariance": posterior.covariance(last, "B")[:8],
    }


def of_factors(la: LaplaceLoRA) -> Quantities:
    last = la.factors[la.layers[-1].name]
    return {
        "factors-A-input": last.A.input_factor,
        "factors-A-gradient": last.A.gradient_factor,
        "factors-B-input": last.B.input_factor,
        "factors-B-gradient": last.B.gradient_factor,
    }


def of_logits(la: LaplaceLoRA, test: tiny.Batch) -> Quantities:
    mean, covariance = la.logit_distribution(test)
    means, covariances = la.logit_distribution(test, prior_precision=TWO_PRIORS)
    return {
        "logits-mean": mean,
        "logits-covariance": covariance,
        "logits-two-priors-mean": means,
        "logits-two-priors-covariance": covariances,
    }


def of_classification(la: LaplaceLoRA, problem: Problem) -> Quantities:
    found = {
        f"predict-{link}": la.predict(problem.test, link_approx=link) for link in ("probit", "bridge", "map")
    }
    found["predict-mc"] = la.predict(problem.test, link_approx="mc", n_samples=50)
    found["predict-two-priors"] = la.predict(problem.test, prior_precision=TWO_PRIORS)
    over_loader = la.predictions(
        problem.validation, link_approx="bridge", prior_precision=0.2, progress=False
    )
    return found | {"predictions": over_loader.probs, "predictions-labels": over_loader.labels}


def of_regression(la: LaplaceLoRA, problem: Problem) -> Quantities:
    over_loader = la.predictions(problem.validation, prior_precision=0.2, progress=False)
    return {
        "predict": la.predict(problem.test),
        "predictive_variance": la.predictive_variance(problem.test),
        "predictions": over_loader.mean,
        "predictions-variance": over_loader.variance,
        "predictions-labels": over_loader.labels,
    }


def samples(la: LaplaceLoRA, folder: Path) -> Tensor:
    """Two sampled adapters, read back: [2, P], weights in the order of their names."""
    drawn = [
        load_file(path / "adapter_model.safetensors") for path in la.sample_adapters(folder, 2, force=True)
    ]
    return torch.stack(
        [torch.cat([each[name].flatten() for name in sorted(each) if "lora_" in name]) for each in drawn]
    )


def of_tuning(la: LaplaceLoRA, case: Case) -> Quantities:
    """The prior precisions that each way of tuning finds, from the case's own."""
    held_out = case.problem.validation
    ways = {
        "held-out": HeldOut(held_out, grid=GRID),
        "held-out-side": HeldOut(held_out, per="side", grid=GRID),
        "evidence": Evidence(),
    }
    if not case.problem.regression:
        ways["held-out-bridge"] = HeldOut(held_out, link_approx="bridge", grid=GRID)
        ways["held-out-mc"] = HeldOut(held_out, per="side", link_approx="mc", n_samples=50, grid=GRID)
    if case.refitted:
        ways["leave-one-out"] = LeaveOneOut(grid=GRID)
    else:
        ways |= {"evidence-side": Evidence(per="side"), "evidence-layer": Evidence(per="layer")}
    start, found = la.prior_precision, {}
    for name, way in ways.items():
        la.prior_precision = start
        found[f"tuned-{name}"] = as_tensor(la.optimize_prior_precision(way, progress=False))
    return found


def as_tensor(value: float | Mapping[str, float]) -> Tensor:
    """A prior precision as numbers: one, or one a key in the keys' order."""
    values = [value[key] for key in sorted(value)] if isinstance(value, Mapping) else value
    return torch.tensor(values, dtype=torch.float64)
