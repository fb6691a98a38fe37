"""The peers, run on the same model and batches, and this project behind their interfaces.

A peer that cannot be imported skips its benchmarks: `pip install --no-deps -r bench/requirements-peers.txt`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import models
from bench.models import Batch, Setting
from bench.oracle import PRIOR_PRECISION, Curvature

OURS_IN_BAYESIAN_LORA = "laplace_lora_fast.integrations.bayesian_lora"
# bayesian-lora's rank of large factors, and the dimension from which one is large
N_KFAC, THRESHOLD = 10, 100


class Loader(list[Batch]):
    """Batches with the `dataset` attribute whose length laplace-torch reads."""

    @property
    def dataset(self) -> range:
        return range(sum(len(batch["input_ids"]) for batch in self))


class Logits(nn.Module):
    """The model as laplace-torch wants it: a batch in, logits [N, C] out."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.model, self.answers, self.output_size = setting.model, setting.answers, len(setting.answers)

    def forward(self, batch: Batch) -> Tensor:
        return models.answer_logits(self.model, batch, self.answers)


def own_copy(setting: Setting) -> Setting:
    """For peers that leave hooks, wrappers or gradients in the model."""
    return replace(setting, model=copy.deepcopy(setting.model))


def laplace_backend(name: str) -> Any:
    """A curvature class of laplace-torch: curvlinops', asdl's, or this project's."""
    modules = {
        "CurvlinopsGGN": "laplace.curvature.curvlinops",
        "AsdlGGN": "laplace.curvature.asdl",
        "FastGGN": "laplace_lora_fast.integrations.laplace_torch",
    }
    return getattr(_import(modules[name]), name)


def laplace_torch_fit(setting: Setting, backend: str) -> Callable[[], Any]:
    """A function that fits laplace-torch's Kronecker posterior to all LoRA weights."""
    laplace, curvature = _import("laplace"), laplace_backend(backend)
    model = Logits(own_copy(setting) if backend == "AsdlGGN" else setting)

    def fit() -> Any:
        posterior = laplace.Laplace(
            model, "classification", "all", "kron", backend=curvature, prior_precision=PRIOR_PRECISION
        )
        posterior.fit(Loader(setting.loader))
        return posterior

    return fit


@cache
def laplace_torch(setting: Setting, backend: str) -> Any:
    """Its fitted posterior."""
    return laplace_torch_fit(setting, backend)()


@cache
def lowrank_kron(setting: Setting) -> Any:
    """laplace-torch's posterior with this project's structure, fitted."""
    laplace, _ = _import("laplace"), _import("laplace_lora_fast.integrations.laplace_torch")
    posterior = laplace.Laplace(
        Logits(setting), "classification", "all", "lowrank_kron", prior_precision=PRIOR_PRECISION
    )
    posterior.fit(setting.loader)
    return posterior


def laplace_torch_curvature(posterior: Any) -> Curvature:
    kron = posterior.H
    pairs = []
    for vectors, values in zip(kron.eigenvectors, kron.eigenvalues, strict=True):
        g, x = (
            (Q.double() * value.double()) @ Q.double().mT for Q, value in zip(vectors, values, strict=True)
        )
        pairs.append((x, g))
    return pairs


def bayesian_lora_fit(
    setting: Setting, package: str = "bayesian_lora", **options: Any
) -> Callable[[], dict[str, tuple[Tensor, Tensor]]]:
    """A function that computes bayesian-lora's Kronecker factors."""
    peer, model = _import(package), own_copy(setting).model

    def fit() -> dict[str, tuple[Tensor, Tensor]]:
        factors = peer.calculate_kronecker_factors(
            model,
            partial(models.answer_logits, answers=setting.answers),
            setting.loader,
            n_kfac=N_KFAC,
            lr_threshold=THRESHOLD,
            target_module_keywords=["lora"],
            **options,
        )
        model.eval()  # bayesian-lora leaves it in training mode
        return factors

    return fit


@cache
def bayesian_lora(setting: Setting, package: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Its fitted factors, the small ones as Cholesky roots."""
    factors = bayesian_lora_fit(setting, package)()
    return _import(package).cholesky_decompose_small_factors(factors, THRESHOLD, "cpu", torch.float32)


def bayesian_lora_curvature(factors: dict[str, tuple[Tensor, Tensor]]) -> Curvature:
    """Dense factors; those that are not square are roots."""
    return [
        tuple(part if part.shape[0] == part.shape[1] else part @ part.mT for part in pair)
        for pair in factors.values()
    ]


def bayesian_lora_jacobian(
    setting: Setting, package: str = "bayesian_lora"
) -> Callable[[], dict[str, Tensor]]:
    """A function that computes the Jacobians of the first batch, [N, C, *weight]."""
    peer, batch = _predictive(package), models.inputs(setting.loader[0])

    def jacobian() -> dict[str, Tensor]:
        found, _ = peer.jacobian_mean(
            setting.model, batch, output_callback=lambda output: output.logits[:, -1, setting.answers]
        )
        return {name: value.detach() for name, value in found.items()}

    return jacobian


def bayesian_lora_predict(setting: Setting, package: str = "bayesian_lora") -> Callable[[], Tensor]:
    """A function that computes the logit covariance [N, C, C] of the first batch."""
    peer, factors = _predictive(package), bayesian_lora(setting, package)
    jacobian, batch = bayesian_lora_jacobian(setting, package), SimpleNamespace(**setting.loader[0])
    prior_variance, sizes = torch.tensor(1 / PRIOR_PRECISION), (len(setting.answers), models.RANK, N_KFAC)
    return lambda: peer.variance(batch, jacobian(), factors, prior_variance, *sizes, "cpu")


def bayesian_lora_evidence(setting: Setting, package: str = "bayesian_lora") -> Callable[[], float]:
    """A function that evaluates the evidence from the factors."""
    peer, factors = _import(package), bayesian_lora(setting, package)
    with torch.no_grad():
        likelihood = -sum(
            nn.functional.cross_entropy(setting.logits(batch), batch["labels"], reduction="sum")
            for batch in setting.loader
        )
    prior_variance = torch.tensor(1 / PRIOR_PRECISION)
    sizes = models.RANK, N_KFAC
    return lambda: peer.model_evidence(setting.model, likelihood, factors, *sizes, prior_variance).item()


def kronfluence_fit(setting: Setting) -> Callable[[], dict[str, dict[str, Tensor]]]:
    """A function that computes kronfluence's covariance matrices, from the labels of the data."""
    covariance = _import("kronfluence.factor.covariance")
    arguments = _import("kronfluence.arguments").FactorArguments(use_empirical_fisher=True)
    state = _import("kronfluence.utils.state").State()

    class Task(_import("kronfluence.task").Task):
        def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
            logits = models.answer_logits(model, batch, setting.answers)
            return nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")

        def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return [f"{layer}.lora_{side}.default" for layer in setting.layers for side in "AB"]

        def get_attention_mask(self, batch: Batch) -> Tensor:
            return batch["attention_mask"]

    task = Task()
    model = _import("kronfluence.module.utils").wrap_tracked_modules(own_copy(setting).model, task)

    def fit() -> dict[str, dict[str, Tensor]]:
        _, factors = covariance.fit_covariance_matrices_with_loader(
            model, state, task, setting.loader, arguments, disable_tqdm=True
        )
        return factors

    return fit


def kronfluence_curvature(factors: dict[str, dict[str, Tensor]]) -> Curvature:
    """Activations as a mean over their count, gradients as a sum."""
    counts = factors["num_activation_covariance_processed"]
    return [
        (x / counts[name], factors["gradient_covariance"][name])
        for name, x in factors["activation_covariance"].items()
    ]


def _predictive(package: str) -> Any:
    """Where `jacobian_mean` and `variance` are: bayesian-lora's top level lacks the former."""
    return _import("bayesian_lora.main" if package == "bayesian_lora" else package)


def _import(module: str) -> Any:
    return pytest.importorskip(module, exc_type=ImportError)
