"""The peers, run on the same model and batches, and what each computes differently.

A peer that cannot be imported skips its benchmarks: `pip install --no-deps -r bench/requirements-peers.txt`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import models

N_KFAC, THRESHOLD = (
    10,
    100,
)  # bayesian-lora's rank of large factors, and the dimension from which one is large

NOTES = {
    "bayesian-lora fit": (
        "one sampled label (1 backward pass, not C - 1), last token only at every layer, rank 10"
    ),
    "laplace-torch fit": "the same factors without padding; with padding it counts the padding as data",
    "bayesian-lora predict": "covariance from its own factors (see fit)",
    "laplace-torch predict": "the same covariance without padding; materialises the Jacobian of all weights",
}


class Loader(list[models.Batch]):
    """Batches with the `dataset` attribute whose length laplace-torch reads."""

    @property
    def dataset(self) -> range:
        return range(sum(len(batch["input_ids"]) for batch in self))


class _Logits(nn.Module):
    """The model as laplace-torch wants it: a batch in, logits [N, C] out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: models.Batch) -> Tensor:
        return models.logits(self.model, batch)


def laplace_torch(model: nn.Module, loader: list[models.Batch]) -> Callable[[], Any]:
    """A function that fits laplace-torch's Kronecker posterior (curvlinops, exact Fisher, expand)."""
    laplace = pytest.importorskip("laplace", exc_type=ImportError)
    backend = pytest.importorskip("laplace.curvature.curvlinops", exc_type=ImportError).CurvlinopsGGN
    data, wrapped = Loader(loader), _Logits(model)

    def fit() -> Any:
        posterior = laplace.Laplace(
            wrapped, "classification", subset_of_weights="all", hessian_structure="kron", backend=backend
        )
        posterior.fit(data)
        return posterior

    return fit


def bayesian_lora_fit(model: nn.Module, loader: list[models.Batch]) -> Callable[[], Any]:
    """A function that computes bayesian-lora's Kronecker factors."""
    peer = pytest.importorskip("bayesian_lora", exc_type=ImportError)

    def fit() -> Any:
        factors = peer.calculate_kronecker_factors(
            model,
            models.logits,
            loader,
            n_kfac=N_KFAC,
            lr_threshold=THRESHOLD,
            target_module_keywords=["lora"],
        )
        model.eval()  # it leaves the model in training mode
        return factors

    return fit


def bayesian_lora_predict(
    model: nn.Module, loader: list[models.Batch], batch: models.Batch
) -> Callable[[], Tensor]:
    """A function that computes bayesian-lora's logit covariance [N, C, C] of a batch."""
    peer = pytest.importorskip("bayesian_lora", exc_type=ImportError)
    main = pytest.importorskip("bayesian_lora.main", exc_type=ImportError)
    factors = peer.cholesky_decompose_small_factors(
        bayesian_lora_fit(model, loader)(), THRESHOLD, "cpu", torch.float32
    )
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    inputs |= {"use_cache": False, "logits_to_keep": 1}

    def predict() -> Tensor:
        jacobian, _ = main.jacobian_mean(
            model, inputs, output_callback=lambda output: output.logits[:, -1, models.ANSWERS]
        )
        detached = {name: value.detach() for name, value in jacobian.items()}
        covariance: Tensor = main.variance(
            SimpleNamespace(**inputs),
            detached,
            factors,
            torch.tensor(1.0),
            len(models.ANSWERS),
            models.RANK,
            N_KFAC,
            "cpu",
        )
        return covariance

    return predict


def best_last_token_trace(model: nn.Module, loader: list[models.Batch], layer: str) -> float:
    """The trace that the best rank-10 factor of a layer's last-token inputs captures: bayesian-lora's oracle."""
    rows: list[Tensor] = []
    module = model.get_submodule(layer)
    handle = module.register_forward_pre_hook(lambda _, args: rows.append(args[0][:, -1].double()))
    with torch.no_grad():
        for batch in loader:
            models.logits(model, batch)
    handle.remove()
    return float(torch.linalg.svdvals(torch.cat(rows))[:N_KFAC].square().sum())
