"""LaplaceLoRA: fit, tune the prior, predict, sample, save."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora_fast import adapters, predictive, prior, state, validation
from laplace_lora_fast.errors import (
    InvalidBatchError,
    LaplaceError,
    NotFittedError,
    NumericalError,
    StateError,
)
from laplace_lora_fast.fit import Fit, fit_kfac
from laplace_lora_fast.heads import Head, OutputFn
from laplace_lora_fast.kfac import FactorKind, FactorPlan, Kfac, KfacAccumulator
from laplace_lora_fast.likelihoods import (
    Categorical,
    Fisher,
    Gaussian,
    Likelihood,
    Link,
    contrast_cotangents,
    probabilities,
)
from laplace_lora_fast.posterior import Posterior
from laplace_lora_fast.predictive import LinearisedModel
from laplace_lora_fast.prior import PriorPrecision, PriorStructure
from laplace_lora_fast.summary import LayerFactors, layer_factors, summarise
from laplace_lora_fast.taps import Site, find_sites, parameters_left_alone, read_adapter

Batch = Mapping[str, Any]
PriorPrecisions = PriorPrecision | Sequence[PriorPrecision]


class TuningMethod(str, Enum):
    """How the prior precision is chosen."""

    MARGLIK = "marglik"
    VAL_NLL = "val_nll"


class LaplaceLoRA:
    """Laplace posterior over the LoRA weights of a PEFT model (Yang, Robeyns, Wang, Aitchison, ICLR 2024).

    The posterior is Gaussian around the trained adapter; its precision is a Kronecker-factored Fisher information
    plus the prior's. Predictions come from the model linearised in the LoRA weights. Trained parameters other than
    LoRA weights (`modules_to_save`, biases) keep their values: see `parameters_left_alone`.

        la = LaplaceLoRA(model, answer_token_ids=ids)
        la.fit(train_loader)
        la.optimize_prior_precision(method="val_nll", val_loader=val_loader)
        probs = la.predict(batch)

    Args:
        model: a PEFT model with one active LoRA adapter. Never changed.
        likelihood: "classification" (softmax over C >= 2 logits) or "regression" (Gaussian).
        answer_token_ids: causal language models: the classes are the logits of these tokens at the last real
            position, in this order.
        output_fn: instead: (model output, batch) -> logits [N, C]. Models with a `logits` [N, C] output
            (sequence classification) need neither.
        structure: of the curvature: "kfac".
        kfac: "reduce" or "expand", how the tokens of an example share a weight (Eschenhagen et al. 2023). "paper" is
            the convention of the code behind the Laplace-LoRA paper, to compare with published results: pads count,
            and the curvature is too large by the padded length of a batch.
        fisher: "exact" (GGN, rank-of-Hessian backward passes a batch), "mc" (sampled labels) or "empirical".
        mc_samples: labels drawn per example for fisher="mc".
        factor: "dense", "sketch", or "auto": dense, smallest first, within `memory_budget`.
        rank: leading eigenpairs kept of each large factor, besides its tail. None: all of a dense factor, a
            quarter of `sketch_size` of a sketched one.
        memory_budget: bytes of dense factors for factor="auto".
        sketch_size: columns of a sketch.
        prior_precision: a number, {"A": .., "B": ..}, or {layer name: ..}.
        prior_mean: None for zero, or the adapter the training started from: a PEFT folder or state dict.
        sigma_noise: noise standard deviation of the regression likelihood.
        seed: of sampled labels, sketches, Monte-Carlo predictions and posterior samples.

    Attributes:
        prior_precision: as passed or tuned; may be assigned.
        sigma_noise: as passed or tuned; may be assigned.
        sites: the LoRA layers, in the order of `model.named_modules()`.

    Raises:
        UnsupportedAdapterError: no LoRA layer, or one this does not cover; names the layer.
        ValueError: an argument is not one of its choices.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str = "classification",
        *,
        answer_token_ids: Sequence[int] | None = None,
        output_fn: OutputFn | None = None,
        structure: str = "kfac",
        kfac: str = "reduce",
        fisher: str = "exact",
        mc_samples: int = 1,
        factor: str = "auto",
        rank: int | None = None,
        memory_budget: int = 4 * 2**30,
        sketch_size: int = 128,
        prior_precision: PriorPrecision = 1.0,
        prior_mean: str | PathLike[str] | Mapping[str, Tensor] | None = None,
        sigma_noise: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.likelihood: Likelihood = _likelihood(likelihood)
        _choice("structure", structure, ("kfac",))
        self.structure = structure
        self.kfac = Kfac(_choice("kfac", kfac, [m.value for m in Kfac]))
        self.fisher = Fisher(_choice("fisher", fisher, [m.value for m in Fisher]))
        kind = FactorKind(_choice("factor", factor, [m.value for m in FactorKind]))
        for name, value in (("mc_samples", mc_samples), ("sketch_size", sketch_size), ("rank", rank)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.rank, self.mc_samples, self.seed = rank, mc_samples, seed
        self.sigma_noise = sigma_noise
        self._plan = FactorPlan(kind, memory_budget, sketch_size, seed)
        self._head = Head(model, answer_token_ids, output_fn)
        self.sites = find_sites(model, self._head)
        self.prior_precision = prior_precision
        self._prior_mean: list[Tensor] | None = None
        if prior_mean is not None:
            pairs = read_adapter(prior_mean, self.sites)
            self._prior_mean = [weight for a, b in pairs for weight in (a, b.mT)]
        self._fit: Fit | None = None
        self._versions: list[tuple[int, int]] = []

    @property
    def prior_precision(self) -> PriorPrecision:
        """The prior precision of the LoRA weights: a number, {"A": .., "B": ..} or {layer name: ..}."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: PriorPrecision) -> None:
        prior.resolve(value, self._block_names())
        if isinstance(value, Mapping):
            self._prior_precision: PriorPrecision = {key: float(each) for key, each in value.items()}
        else:
            self._prior_precision = float(value)

    @property
    def sigma_noise(self) -> float:
        """The noise standard deviation of the regression likelihood."""
        return self._sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, value: float) -> None:
        if not 0 < value < math.inf:
            raise ValueError(f"sigma_noise must be positive and finite, got {value}")
        self._sigma_noise = float(value)

    @property
    def parameters_left_alone(self) -> list[str]:
        """Names of trained parameters that are not LoRA weights: they keep their MAP value, without uncertainty."""
        return parameters_left_alone(self.model, self.sites)

    def fit(self, train_loader: Iterable[Batch], *, progress: bool = True) -> LaplaceLoRA:
        """Fits the posterior: one pass over the training data, rank-of-Hessian backward passes a batch.

        Args:
            train_loader: batches as transformers makes them: dicts with `input_ids`, `attention_mask`, `labels`.
                Labels ([N] class indices, or regression targets) are needed for the evidence and for
                fisher="empirical" only.
            progress: show a bar.

        Returns:
            self.

        Raises:
            InvalidBatchError: the loader is empty, or a batch is unusable.
            NumericalError: a layer's curvature is not finite.
        """
        sites = find_sites(self.model, self._head)
        fit = fit_kfac(
            self.model,
            self._head,
            sites,
            train_loader,
            self.likelihood,
            self.fisher,
            KfacAccumulator(sites, self.kfac, self._plan),
            rank=self.rank,
            mc_samples=self.mc_samples,
            seed=self.seed,
            progress=progress,
        )
        self.sites, self._fit = sites, fit
        self._versions = _versions(sites)
        return self

    @property
    def posterior(self) -> Posterior:
        """The Gaussian over the LoRA weights at the current prior precision and noise."""
        fit = self._fitted()
        scale = self._curvature_scale()
        blocks = fit.blocks if scale == 1 else [block.scaled(scale) for block in fit.blocks]
        return Posterior(blocks, self._resolve(None))

    @property
    def factors(self) -> dict[str, LayerFactors]:
        """For each LoRA layer the Kronecker factors of lora_A and lora_B at unit noise."""
        return layer_factors(self._fitted().blocks, self.sites)

    def log_marginal_likelihood(self, prior_precision: PriorPrecision | None = None) -> Tensor:
        """Laplace's estimate of log p(D | prior), fp64 scalar.

        Args:
            prior_precision: evaluates another one than the current.

        Raises:
            NotFittedError: before `fit`, or fitted on batches without labels.
        """
        fit = self._fitted()
        if fit.log_likelihood is None:
            raise NotFittedError(
                "the evidence needs 'labels' in every batch of train_loader: fit again with them"
            )
        posterior = self.posterior
        lam = self._resolve(prior_precision)
        penalty = (lam * torch.tensor(self._squared_norms(), dtype=torch.float64)).sum()
        log_det = Posterior(posterior.blocks, lam).log_det_ratio().cpu()
        return self._log_likelihood(fit, fit.log_likelihood) - 0.5 * (penalty + log_det)

    def optimize_prior_precision(
        self,
        method: str = "marglik",
        *,
        prior_structure: str = "scalar",
        val_loader: Iterable[Batch] | None = None,
        link_approx: str = "probit",
        n_samples: int = 1000,
        grid: Sequence[float] = validation.DEFAULT_GRID,
        tune_sigma_noise: bool = False,
        progress: bool = True,
    ) -> PriorPrecision:
        """Chooses the prior precision, and sets and returns it.

        Args:
            method: "marglik" maximises the evidence (milliseconds, no model pass). "val_nll" minimises the held-out
                negative log-likelihood over `grid` with one pass over `val_loader`, none per value; recommended
                wherever a few held-out examples exist.
            prior_structure: "scalar", "ab" (one for all lora_A, one for all lora_B) or, for "marglik" only,
                "layerwise".
            val_loader: labelled batches for "val_nll".
            link_approx: predictive link of "val_nll": "probit", "mc" or "bridge".
            n_samples: of the "mc" link.
            grid: values tried by "val_nll", ascending.
            tune_sigma_noise: regression and "marglik" only: maximise the evidence over the noise as well.
            progress: show a bar.

        Raises:
            NumericalError: the evidence has no maximum.
            ValueError: arguments that do not go together.
        """
        structure = PriorStructure(
            _choice("prior_structure", prior_structure, [m.value for m in PriorStructure])
        )
        chosen = TuningMethod(_choice("method", method, [m.value for m in TuningMethod]))
        if tune_sigma_noise and (chosen is not TuningMethod.MARGLIK or self.likelihood.name != "regression"):
            raise ValueError("tune_sigma_noise needs likelihood='regression' and method='marglik'")
        if chosen is TuningMethod.VAL_NLL:
            link = Link(_choice("link_approx", link_approx, [m.value for m in Link if m is not Link.MAP]))
            self.prior_precision = self._minimise_val_nll(
                structure, val_loader, link, n_samples, grid, progress
            )
        elif tune_sigma_noise:
            self._maximise_evidence_with_noise(structure)
        else:
            self.prior_precision = prior.maximise_evidence(
                structure, self.posterior.blocks, self._squared_norms()
            )
        return self.prior_precision

    def logit_distribution(
        self, batch: Batch, prior_precision: PriorPrecisions | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean [N, C] and covariance [N, C, C] of the linearised model's outputs; C backward passes.

        Args:
            batch: as for `fit`; labels are not needed.
            prior_precision: another one than the current, or a list of G: the covariance is then [G, N, C, C].

        Returns:
            fp32 (fp64 for an fp64 model).
        """
        classes = self._fitted().n_outputs
        mean, cov, _ = self._distribution([batch], torch.eye(classes), prior_precision, False)
        return mean, cov

    def predict(
        self,
        batch: Batch,
        *,
        link_approx: str = "probit",
        n_samples: int = 1000,
        prior_precision: PriorPrecisions | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predictive distribution of one batch.

        Args:
            batch: as for `fit`; labels are not needed.
            link_approx: classification: "probit" (pairwise, invariant to shifts of the logits), "mc" (seeded
                Monte-Carlo softmax), "bridge" (Laplace bridge) or "map" (the plain model). All but "map" take C - 1
                backward passes.
            n_samples: of the "mc" link.
            prior_precision: another one than the current, or a list of G: the result then has a leading axis G.

        Returns:
            Classification: probabilities [N, C]. Regression: mean [N, C] and variance [N, C] with the noise in it.
        """
        result, _ = self._predict([batch], link_approx, n_samples, prior_precision, False)
        return result

    def predict_loader(
        self,
        loader: Iterable[Batch],
        *,
        link_approx: str = "probit",
        n_samples: int = 1000,
        prior_precision: PriorPrecisions | None = None,
        progress: bool = True,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor | None]:
        """`predict` over a loader.

        Returns:
            What `predict` returns, for all examples in the loader's order, and their labels (None if not all
            batches have labels).
        """
        return self._predict(loader, link_approx, n_samples, prior_precision, progress)

    def sample_adapters(self, folder: str | PathLike[str], n: int) -> list[Path]:
        """Draws n adapters from the posterior and writes them as ordinary PEFT adapter folders.

        Returns:
            The folders, loadable by `peft.PeftModel.from_pretrained`.
        """
        self._fitted()
        generator = torch.Generator().manual_seed(self.seed)
        return adapters.save_samples(self.model, self.sites, self.posterior.sample(n, generator), folder)

    def save(self, folder: str | PathLike[str]) -> None:
        """Writes the posterior to `folder`/posterior.safetensors. The adapter itself is PEFT's to save."""
        answers = self._head.answer_token_ids
        settings = {
            "likelihood": self.likelihood.name,
            "structure": self.structure,
            "kfac": self.kfac.value,
            "fisher": self.fisher.value,
            "mc_samples": self.mc_samples,
            "factor": self._plan.kind.value,
            "rank": self.rank,
            "memory_budget": self._plan.memory_budget,
            "sketch_size": self._plan.sketch_size,
            "answer_token_ids": None if answers is None else answers.tolist(),
            "output_fn": self._head.output_fn is not None,
            "prior_precision": self.prior_precision,
            "sigma_noise": self.sigma_noise,
            "seed": self.seed,
        }
        state.save(folder, *self.snapshot(), settings)

    @classmethod
    def load(
        cls, folder: str | PathLike[str], model: nn.Module, *, output_fn: OutputFn | None = None
    ) -> LaplaceLoRA:
        """Reads a posterior that `save` wrote.

        Args:
            folder: what was passed to `save`.
            model: the model with the same adapter it was fitted on.
            output_fn: the one it was fitted with, if any.

        Raises:
            StateError: the file is missing, truncated, of another format, or of another adapter; says which.
            ValueError: `output_fn` is given and the fit had none, or the other way round.
        """
        fit, prior_mean, settings = state.load(folder)
        settings = dict(settings)
        if settings.pop("output_fn", False) != (output_fn is not None):
            raise ValueError(
                "output_fn must be the one the posterior was fitted with, or None if it had none"
            )
        try:
            precision = settings.pop("prior_precision")
            la = cls(model, output_fn=output_fn, **settings)
            la.restore(fit, precision, prior_mean)
        except LaplaceError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"the posterior's settings do not fit: {error}") from error
        return la

    def snapshot(self) -> tuple[Fit, list[Tensor] | None]:
        """The fit, and the prior mean of each block (None for zero): with the prior precision, the whole posterior."""
        return self._fitted(), self._prior_mean

    def restore(self, fit: Fit, prior_precision: PriorPrecision, prior_mean: list[Tensor] | None) -> None:
        """Takes over a posterior that was fitted on this adapter elsewhere, in the form `snapshot` gives.

        Raises:
            StateError: the fit is of another adapter; names the layer.
            ValueError: the prior precision is not positive or does not cover the layers.
        """
        matched = state.match(fit, self.sites)
        self.prior_precision = prior_precision
        self._fit, self._prior_mean, self._versions = matched, prior_mean, _versions(self.sites)

    def summary(self) -> str:
        """A table: per LoRA layer shapes, kept rank, captured curvature, effective number of parameters."""
        self._fitted()
        return summarise(self.posterior, self.prior_precision, self.parameters_left_alone)

    def _fitted(self) -> Fit:
        """The fit, if it still belongs to the adapter's weights."""
        if self._fit is None:
            raise NotFittedError("call fit(train_loader) or load(...) first")
        versions = _versions(self.sites)
        if versions != self._versions:
            for block, site in zip(self._fit.blocks, (s for s in self.sites for _ in "AB"), strict=True):
                if not state.same_weights(state.map_weight(site, block.side), block.mean):
                    raise NotFittedError(
                        f"the adapter's weights of layer {site.name!r} changed since fit: fit again"
                    )
            self._versions = versions
        return self._fit

    def _block_names(self) -> list[prior.BlockName]:
        return [(site.name, side) for site in self.sites for side in "AB"]

    def _resolve(self, prior_precision: PriorPrecision | None) -> Tensor:
        """The prior precision of each block; None for the current one."""
        value = self.prior_precision if prior_precision is None else prior_precision
        return prior.resolve(value, self._block_names())

    def _curvature_scale(self) -> float:
        return 1 / self.sigma_noise**2 if self.likelihood.name == "regression" else 1.0

    def _log_likelihood(self, fit: Fit, at_unit_noise: float) -> float:
        if self.likelihood.name != "regression":
            return at_unit_noise
        count = fit.n_examples * fit.n_outputs
        return at_unit_noise / self.sigma_noise**2 - count * math.log(
            self.sigma_noise * math.sqrt(2 * math.pi)
        )

    def _squared_norms(self) -> list[float]:
        blocks = self._fitted().blocks
        means = self._prior_mean or [torch.zeros((), dtype=torch.float64)] * len(blocks)
        return [
            float((block.mean.double() - mean.to(block.mean.device).double()).square().sum())
            for block, mean in zip(blocks, means, strict=True)
        ]

    def _maximise_evidence_with_noise(self, structure: PriorStructure) -> None:
        """Coordinate ascent: each step is the exact maximum over one of (prior precision, noise)."""
        fit = self._fitted()
        if fit.log_likelihood is None:
            raise NotFittedError("tune_sigma_noise needs 'labels' in every batch of train_loader")
        residuals, count = -2 * fit.log_likelihood, fit.n_examples * fit.n_outputs
        if not residuals > 0:
            raise NumericalError(
                "the model interpolates its targets: the evidence has no maximum in sigma_noise"
            )
        for _ in range(500):
            before = self.sigma_noise
            self.prior_precision = prior.maximise_evidence(
                structure, self.posterior.blocks, self._squared_norms()
            )
            self.sigma_noise = prior.evidence_noise(
                fit.blocks, self.posterior.prior_precision, residuals, count
            )
            if abs(math.log(self.sigma_noise / before)) < 1e-12:
                break
        self.prior_precision = prior.maximise_evidence(
            structure, self.posterior.blocks, self._squared_norms()
        )

    def _minimise_val_nll(
        self,
        structure: PriorStructure,
        val_loader: Iterable[Batch] | None,
        link: Link,
        n_samples: int,
        grid: Sequence[float],
        progress: bool,
    ) -> PriorPrecision:
        if val_loader is None:
            raise ValueError("method='val_nll' needs val_loader")
        if structure is PriorStructure.LAYERWISE:
            raise ValueError(
                "method='val_nll' tunes prior_structure 'scalar' or 'ab': a few held-out examples decide no more"
            )
        ascending = len(grid) > 1 and all(a < b for a, b in pairwise(grid))
        if not (ascending and grid[0] > 0 and grid[-1] < math.inf):
            raise ValueError("grid must hold at least two ascending positive values")
        keys = prior.group_keys(structure, self._block_names())
        names = list(dict.fromkeys(keys))
        precisions = torch.tensor(grid, dtype=torch.float64).expand(len(keys), -1)
        parts = [names.index(key) for key in keys]
        mean, cov, labels = predictive.distribution(
            self._linearised(),
            precisions,
            parts,
            val_loader,
            self._predictive_cotangents(),
            "validate",
            progress,
        )
        if labels is None:
            raise InvalidBatchError("method='val_nll' needs 'labels' in every batch of val_loader")
        table = self._val_nll(mean, cov, labels, link, n_samples)
        best = validation.best_prior_precision(table, torch.tensor(grid, dtype=torch.float64))
        return best[0] if structure is PriorStructure.SCALAR else dict(zip(names, best, strict=True))

    def _val_nll(self, mean: Tensor, parts: Tensor, labels: Tensor, link: Link, n_samples: int) -> Tensor:
        if self.likelihood.name == "regression":
            return validation.regression_nll(mean, parts, labels, self.sigma_noise)
        generator = torch.Generator().manual_seed(self.seed)
        return validation.classification_nll(mean, parts, labels, link, n_samples, generator)

    def _predictive_cotangents(self) -> Tensor:
        outputs = self._fitted().n_outputs
        return (
            contrast_cotangents(outputs) if self.likelihood.name == "classification" else torch.eye(outputs)
        )

    def _predict(
        self,
        loader: Iterable[Batch],
        link_approx: str,
        n_samples: int,
        prior_precision: PriorPrecisions | None,
        progress: bool,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor | None]:
        link = Link(_choice("link_approx", link_approx, [m.value for m in Link]))
        if link is Link.MAP and self.likelihood.name == "classification":
            logits, labels = predictive.map_logits(self._linearised(), loader, progress)
            return logits.softmax(-1), labels
        mean, cov, labels = self._distribution(
            loader, self._predictive_cotangents(), prior_precision, progress
        )
        if self.likelihood.name == "regression":
            return (mean, cov.diagonal(dim1=-2, dim2=-1) + self.sigma_noise**2), labels
        generator = torch.Generator().manual_seed(self.seed)
        return probabilities(link, mean, cov, n_samples, generator), labels

    def _distribution(
        self,
        loader: Iterable[Batch],
        cotangents: Tensor,
        prior_precision: PriorPrecisions | None,
        progress: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mean [N, K], covariance [N, K, K] (with a leading axis for a list of priors) and labels of a loader."""
        several = isinstance(prior_precision, Sequence)
        tried = prior_precision if isinstance(prior_precision, Sequence) else [prior_precision]
        columns = [self._resolve(value) for value in tried]
        precisions = torch.stack(columns, 1)
        mean, cov, labels = predictive.distribution(
            self._linearised(), precisions, [0] * len(precisions), loader, cotangents, "predict", progress
        )
        return mean, cov[0] if several else cov[0, 0], labels

    def _linearised(self) -> LinearisedModel:
        fit = self._fitted()
        return LinearisedModel(
            self.model,
            self._head,
            self.sites,
            fit.groups,
            self.posterior.blocks,
            self.likelihood,
            fit.n_outputs,
        )


def _likelihood(name: str) -> Likelihood:
    kinds: dict[str, type[Likelihood]] = {kind.name: kind for kind in (Categorical, Gaussian)}
    return kinds[_choice("likelihood", name, list(kinds))]()


def _choice(argument: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{argument} must be one of {list(choices)}, got {value!r}")
    return value


def _versions(sites: Sequence[Site]) -> list[tuple[int, int]]:
    """Changes whenever a LoRA weight is written to or moved; costs no look at the weights."""
    weights = (getattr(site.module, f"lora_{side}")[site.adapter].weight for site in sites for side in "AB")
    return [(weight.data_ptr(), weight._version) for weight in weights]
