"""LaplaceLoRA: fit, tune the prior, predict, sample, save."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from laplace_lora_fast import adapters, identity, prior, state
from laplace_lora_fast.curvature import BlockName, Curvature
from laplace_lora_fast.distributed import Ranks
from laplace_lora_fast.errors import (
    LaplaceError,
    NotFittedError,
    NumericalError,
    StateError,
    UnsupportedAdapterError,
)
from laplace_lora_fast.fit import Fit, Objective
from laplace_lora_fast.heads import Head, OutputFn
from laplace_lora_fast.identity import FrozenWeights, unwrapped
from laplace_lora_fast.likelihoods import (
    Categorical,
    Fisher,
    Gaussian,
    Likelihood,
    Link,
    contrast_cotangents,
    probabilities,
)
from laplace_lora_fast.marglik import Evidence
from laplace_lora_fast.posterior import Posterior
from laplace_lora_fast.predictive import LinearisedModel, distribution, map_logits
from laplace_lora_fast.prior import PriorPrecision, PriorStructure
from laplace_lora_fast.refit import RefittedCurvature
from laplace_lora_fast.structures import FitOptions, check_choice, fit_structure, positive_integer
from laplace_lora_fast.summary import LayerFactors, layer_factors, summarise
from laplace_lora_fast.taps import Layers, Site, find_sites, parameters_left_alone, read_adapter
from laplace_lora_fast.validation import DEFAULT_GRID, minimise_loo_nll, minimise_nll

Batch = Mapping[str, Any]
PriorPrecisions = PriorPrecision | Sequence[PriorPrecision]

_LABELS = ("labels", "label")


class LaplaceLoRA:
    """Laplace posterior over the LoRA weights of a PEFT model (Yang, Robeyns, Wang, Aitchison, ICLR 2024).

    The posterior is Gaussian around the trained adapter; its precision is the Fisher information, exact or
    Kronecker-factored (see `structure`), plus the prior's. Predictions come from the model linearised in the LoRA
    weights. Trained parameters other than LoRA weights (`modules_to_save`, biases) keep their values: see
    `parameters_left_alone`.

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
        structure: of the curvature. "kfac"; "ekfac" (KFAC's eigenvalues re-measured in a second pass); "dual" (the
            exact GGN in row space, for small data); "diag"; or "auto": "kfac" if `kfac`, `factor` or `rank` is given,
            else "dual" where its rows are fewer than the weights and than 4096 and fit `memory_budget`, else "kfac".
        layers: which LoRA layers get a posterior; the others keep their MAP value. None for all, "last" (the adapted
            output head, or else the last decoder or encoder layer), a list of names, or a predicate on names.
        mean: what the linearised outputs are centred on. "map": the trained model's. "refit": the linearised model's
            own optimum under the prior, starting from the model without its adapter (Immer, Korzepa and Bauer 2021).
            It needs "dual" and labels, costs one more forward pass a batch, and can choose its prior precision by
            leaving out one training example at a time ("loo").
        kfac: "reduce" (the default) or "expand", how the tokens of an example share a weight (Eschenhagen et al. 2023).
            "paper" is the convention of the code behind the Laplace-LoRA paper, to compare with published results:
            pads count, and the curvature is too large by the padded length of a batch. With LoRA on the output head,
            pass `output_fn` there: with `answer_token_ids` the head sees the last position only.
        fisher: "exact" (GGN, rank-of-Hessian backward passes a batch), "mc" (sampled labels) or "empirical".
        mc_samples: labels drawn per example for fisher="mc".
        factor: "dense", "sketch", or "auto": dense, smallest first, within `memory_budget`.
        rank: leading eigenpairs kept of each large factor, besides its tail. None: all of a dense factor, a
            quarter of `sketch_size` of a sketched one. Like `kfac` and `factor`, of "kfac" and "ekfac" only.
        memory_budget: bytes of dense factors (and of the rows that wait for them) for factor="auto", of rows kept on
            the device for structure="dual".
        sketch_size: columns of a sketched factor.
        row_sketch_size: columns m of a sketched Jacobian row for structure="dual"; exact from a layer's width on.
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
        ValueError: an argument is not one of its choices, or does not go with another.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str = "classification",
        *,
        answer_token_ids: Sequence[int] | None = None,
        output_fn: OutputFn | None = None,
        structure: str = "auto",
        mean: str = "map",
        layers: Layers = None,
        kfac: str | None = None,
        fisher: str = "exact",
        mc_samples: int = 1,
        factor: str = "auto",
        rank: int | None = None,
        memory_budget: int = 4 * 2**30,
        sketch_size: int = 128,
        row_sketch_size: int = 128,
        prior_precision: PriorPrecision = 1.0,
        prior_mean: str | PathLike[str] | Mapping[str, Tensor] | None = None,
        sigma_noise: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.likelihood: Likelihood = _likelihood(likelihood)
        self.options = FitOptions(
            structure=structure,
            mean=mean,
            kfac=kfac,
            fisher=fisher,
            mc_samples=mc_samples,
            factor=factor,
            rank=rank,
            memory_budget=memory_budget,
            sketch_size=sketch_size,
            row_sketch_size=row_sketch_size,
            seed=seed,
        )
        self.sigma_noise = sigma_noise
        self._peft_model = unwrapped(model)
        self._head = Head(self._peft_model, answer_token_ids, output_fn)
        self._layers = layers
        self.sites = find_sites(self._peft_model, self._head, layers)
        if mean == "refit":
            adapters.refuse_residual_base(self._peft_model, self.sites)
        self.prior_precision = prior_precision
        self._prior_mean: list[Tensor] | None = None
        if prior_mean is not None:
            pairs = read_adapter(adapters.source(prior_mean), self.sites)
            self._prior_mean = [weight for a, b in pairs for weight in (a, b.mT)]
            if mean == "refit" and any(bool(b.any()) for _, b in pairs):
                raise ValueError(
                    "mean='refit' starts from the model without its adapter: prior_mean must have lora_B = 0"
                )
        self._fit: Fit | None = None
        self._frozen = FrozenWeights({})

    @property
    def prior_precision(self) -> PriorPrecision:
        """The prior precision of the LoRA weights: a number, {"A": .., "B": ..} or {layer name: ..}."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: PriorPrecision) -> None:
        self._resolve(value)
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
    def answer_token_ids(self) -> list[int] | None:
        """The tokens whose logits are the classes, or None."""
        answers = self._head.answer_token_ids
        return None if answers is None else answers.tolist()

    @property
    def parameters_left_alone(self) -> list[str]:
        """Names of trained parameters that are not LoRA weights: they keep their MAP value, without uncertainty."""
        return parameters_left_alone(self._peft_model, self.sites)

    def fit(
        self, train_loader: Iterable[Batch], *, group: ProcessGroup | None = None, progress: bool = True
    ) -> LaplaceLoRA:
        """Fits the posterior: one pass over the training data, rank-of-Hessian backward passes a batch.

        The posterior belongs to the model as it is now, and later uses refuse another one. Every use compares the
        adapter's weights and scalings. Frozen weights are compared when `save` is called, on loading, and where a
        write was counted: fused optimisers, which count none, train LoRA weights with them.

        Args:
            train_loader: batches as transformers makes them: dicts with `input_ids`, `attention_mask`, `labels`.
                Labels ([N] class indices, or regression targets) are needed for the evidence and for
                fisher="empirical" only.
            group: process group of torch.distributed, `torch.distributed.group.WORLD` say, whose ranks fit together:
                each passes the batches of its own share of the data and holds the same model, and leaves with the
                posterior of all of the data. None: this process alone.
            progress: show a bar.

        Returns:
            self.

        Raises:
            InvalidBatchError: the loader is empty, or a batch is unusable.
            NumericalError: a layer's curvature is not finite.
            RankError: another rank of `group` failed, or holds another model.
            UnsupportedAdapterError: the active adapter is one this does not cover, or not the one of `prior_mean`.
            ValueError: `prior_precision` names other layers than the active adapter has.
        """
        ranks = Ranks(group)
        with ranks.together():
            sites = self._current_sites()
        options = self.options
        objective = Objective(
            self.model,
            self._head,
            sites,
            self.likelihood,
            Fisher(options.fisher),
            options.mc_samples,
            options.seed,
            ranks,
        )
        fit = fit_structure(objective, train_loader, options, progress)
        self._fit, self.sites = fit, sites
        self._frozen = FrozenWeights.of(self._peft_model, sites)
        return self

    def _current_sites(self) -> list[Site]:
        """The LoRA layers with the adapter that is active now, which may be another one than at the last fit."""
        sites = find_sites(self._peft_model, self._head, self._layers)
        weights, former = ([site.weight_name("A") for site in each] for each in (sites, self.sites))
        if weights != former:
            if self._prior_mean is not None:
                raise UnsupportedAdapterError(
                    f"prior_mean belongs to adapter {self.sites[0].adapter!r}, now {sites[0].adapter!r} is active: "
                    "make a new LaplaceLoRA"
                )
            prior.resolve(self.prior_precision, _block_names(sites))
        if self.options.mean == "refit":
            adapters.refuse_residual_base(self._peft_model, sites)
        return sites

    @property
    def _is_regression(self) -> bool:
        return self.likelihood.name == "regression"

    @property
    def posterior(self) -> Posterior:
        """The Gaussian over the LoRA weights at the current prior precision and noise."""
        return Posterior(self._at_noise(self._fitted().curvature), self._resolve(None))

    @property
    def factors(self) -> dict[str, LayerFactors]:
        """For each LoRA layer the Kronecker factors of lora_A and lora_B at unit noise.

        Raises:
            ValueError: the structure has none.
        """
        return layer_factors(self._fitted().curvature, self.sites)

    def log_marginal_likelihood(self, prior_precision: PriorPrecision | None = None) -> Tensor:
        """Laplace's estimate of log p(D | prior), fp64 scalar.

        Args:
            prior_precision: evaluates another one than the current.

        Raises:
            NotFittedError: before `fit`, or fitted on batches without labels.
        """
        return self._evidence().log_marginal_likelihood(self._resolve(prior_precision), self.sigma_noise)

    def optimize_prior_precision(
        self,
        method: str | None = None,
        *,
        prior_structure: str = "scalar",
        val_loader: Iterable[Batch] | None = None,
        link_approx: str = "probit",
        n_samples: int = 1000,
        grid: Sequence[float] = DEFAULT_GRID,
        tune_sigma_noise: bool = False,
        progress: bool = True,
    ) -> PriorPrecision:
        """Chooses the prior precision, and sets and returns it.

        Args:
            method: "val_nll" minimises the held-out negative log-likelihood over `grid` with one pass over
                `val_loader`, none per value; recommended for mean="map". "loo" needs mean="refit" and no held-out
                data: it minimises the leave-one-out negative log-likelihood of the training examples over `grid`,
                without a model pass; recommended for small training sets. "marglik" maximises the evidence
                (milliseconds, no model pass), a poor guide for an over-trained adapter. None: "val_nll" where
                `val_loader` is given, else "loo" for mean="refit", else "marglik".
            prior_structure: "scalar", "ab" (one for all lora_A, one for all lora_B) or, for "marglik" only,
                "layerwise". Only "scalar" for mean="refit" without held-out data.
            val_loader: labelled batches for "val_nll".
            link_approx: predictive link of "val_nll" and "loo": "probit", "mc" or "bridge".
            n_samples: of the "mc" link.
            grid: values tried by "val_nll" and "loo", ascending.
            tune_sigma_noise: regression and "marglik" only: maximise the evidence over the noise as well.
            progress: show a bar.

        Raises:
            NumericalError: the evidence has no maximum.
            ValueError: arguments that do not go together.
        """
        structure = PriorStructure(
            check_choice("prior_structure", prior_structure, [m.value for m in PriorStructure])
        )
        if method is None:
            without_data = (
                "loo" if self.options.mean == "refit" and prior_structure == "scalar" else "marglik"
            )
            method = without_data if val_loader is None else "val_nll"
        check_choice("method", method, ["marglik", "val_nll", "loo"])
        if val_loader is not None and method != "val_nll":
            raise ValueError(f"method={method!r} does not look at val_loader: use 'val_nll', or leave it out")
        link = Link(check_choice("link_approx", link_approx, [m.value for m in Link if m is not Link.MAP]))
        keys = prior.group_keys(structure, _block_names(self.sites))
        if tune_sigma_noise and not (
            method == "marglik" and self._is_regression and self.options.mean == "map"
        ):
            raise ValueError(
                "tune_sigma_noise needs likelihood='regression', method='marglik' and mean='map'"
            )
        if tune_sigma_noise:
            best, self.sigma_noise = self._evidence().maximise_with_noise(keys, self.sigma_noise)
        elif method == "marglik":
            best = self._evidence().maximise(keys, self.sigma_noise)
        elif method == "loo":
            curvature = self.posterior.curvature
            if not isinstance(curvature, RefittedCurvature) or structure is not PriorStructure.SCALAR:
                raise ValueError("method='loo' needs mean='refit' and prior_structure='scalar'")
            best = {"": minimise_loo_nll(curvature, grid, link, n_samples, self.options.seed, progress)}
        elif val_loader is None:
            raise ValueError("method='val_nll' needs val_loader")
        else:
            with self._linearised() as linearised:
                best = minimise_nll(
                    linearised,
                    keys,
                    val_loader,
                    self._predictive_cotangents(),
                    grid,
                    link,
                    n_samples,
                    self.sigma_noise,
                    self.options.seed,
                    progress,
                )
        self.prior_precision = best[""] if structure is PriorStructure.SCALAR else best
        return self.prior_precision

    def logit_distribution(
        self, batch: Batch, prior_precision: PriorPrecisions | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean [N, C] and covariance [N, C, C] of the linearised model's outputs; C backward passes.

        Args:
            batch: as for `fit`; labels are ignored.
            prior_precision: another one than the current, or a list of G: the covariance is then [G, N, C, C], and the
                mean of a refitted model [G, N, C].

        Returns:
            fp32 (fp64 for an fp64 model).
        """
        classes = self._any_fit().n_outputs
        mean, cov, _ = self._distribution(_unlabelled(batch), torch.eye(classes), prior_precision, False)
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
            batch: as for `fit`; labels are ignored.
            link_approx: classification: "probit" (pairwise, invariant to shifts of the logits), "mc" (seeded
                Monte-Carlo softmax), "bridge" (Laplace bridge) or "map" (the plain model). All but "map" take C - 1
                backward passes.
            n_samples: of the "mc" link.
            prior_precision: another one than the current, or a list of G: the result then has a leading axis G.

        Returns:
            Classification: probabilities [N, C]. Regression: mean [N, C] and variance [N, C] with the noise in it.
        """
        result, _ = self._predict(_unlabelled(batch), link_approx, n_samples, prior_precision, False)
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
            batches have labels). Labels that are there have to be valid: leave out the -1 of an unlabelled test set.
        """
        return self._predict(loader, link_approx, n_samples, prior_precision, progress)

    def sample_adapters(self, folder: str | PathLike[str], n: int) -> list[Path]:
        """Draws n adapters from the posterior and writes them as ordinary PEFT adapter folders.

        Args:
            folder: of the new folders; one with more samples than n is refused.
            n: how many, at least 1.

        Returns:
            The folders, loadable by `peft.PeftModel.from_pretrained`.

        Raises:
            UnsupportedAdapterError: the model is no PeftModel, or has several adapters active.
            ValueError: `n` is no positive integer, or `folder` holds other samples.
        """
        n = positive_integer("n", n)
        samples = self.posterior.sample(n, torch.Generator().manual_seed(self.options.seed))
        return adapters.save_samples(self._peft_model, self.sites, samples, folder)

    def save(self, folder: str | PathLike[str]) -> None:
        """Writes the posterior to `folder`/posterior.safetensors. The adapter itself is PEFT's to save."""
        settings = {
            "likelihood": self.likelihood.name,
            "answer_token_ids": self.answer_token_ids,
            "output_fn": self._head.output_fn is not None,
            "layers": None if self._layers is None else [site.name for site in self.sites],
            "prior_precision": self.prior_precision,
            "sigma_noise": self.sigma_noise,
            **self.options.as_dict(),
        }
        fit, prior_mean = self.snapshot()
        self._require_frozen()
        scalings = [site.scaling for site in self.sites]
        state.save(folder, fit, prior_mean, settings, scalings, self._frozen)

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
            StateError: the file is missing, truncated or of another format; or the model has other LoRA layers,
                weights or scalings, or other base weights or trained modules around them; says which.
            ValueError: `output_fn` is given and the fit had none, or the other way round.
        """
        saved = state.load(folder)
        settings = saved.settings
        if settings.pop("output_fn", False) != (output_fn is not None):
            raise ValueError(
                "output_fn must be the one the posterior was fitted with, or None if it had none"
            )
        try:
            la = cls(model, output_fn=output_fn, **settings)
        except LaplaceError:
            raise
        except (TypeError, ValueError) as error:
            raise StateError(f"the posterior's settings do not fit: {error}") from error
        fit, prior_mean = saved.rebuild(la.sites)
        state.check(fit.curvature, la.sites)
        la._fit, la._prior_mean = fit, prior_mean
        la._frozen = saved.frozen_weights(la._peft_model, la.sites)
        return la

    def snapshot(self) -> tuple[Fit, list[Tensor] | None]:
        """The fit, and the prior mean of each block (None for zero): with the prior precision, the whole posterior."""
        return self._fitted(), self._prior_mean

    def restore(self, fit: Fit, prior_mean: list[Tensor] | None) -> None:
        """Takes over a posterior that was fitted on this adapter elsewhere, in the form `snapshot` gives.

        Raises:
            StateError: the fit is of another adapter, or damaged; names the layer.
        """
        state.check(fit.curvature, self.sites)
        self._fit, self._prior_mean = fit, prior_mean
        self._frozen = FrozenWeights.of(self._peft_model, self.sites)

    def summary(self) -> str:
        """A table: per LoRA layer shapes, kept rank, captured curvature, effective number of parameters."""
        reason = self._fitted().reason
        return summarise(self.posterior, self.prior_precision, self.parameters_left_alone, reason)

    def _any_fit(self) -> Fit:
        """The fit, even if the model has changed since."""
        if self._fit is None:
            raise NotFittedError("call fit(train_loader) or load(...) first")
        return self._fit

    def _fitted(self) -> Fit:
        """The fit, if it belongs to the model as it is now; waits for the device."""
        with self._unchanged() as fit:
            return fit

    @contextmanager
    def _unchanged(self) -> Iterator[Fit]:
        """The fit, for use inside. Raises NotFittedError if the model has changed: at once, or on leaving for a GPU.

        A GPU compares the weights on entering and is asked on leaving: no batch in between waits for it.
        """
        fit, sites = self._any_fit(), self.sites
        identity.require_layers(self._peft_model, sites, NotFittedError)
        if self._frozen.written_to():
            self._require_frozen()
        identity.require_shapes(fit.curvature, sites, NotFittedError)
        unchanged = identity.unchanged_weights(fit.curvature, sites)
        settings = fit.curvature, unchanged, NotFittedError, "changed since fit: fit again"
        if unchanged.device.type == "cpu":
            identity.require_weights(*settings)
        yield fit
        if unchanged.device.type != "cpu":
            identity.require_weights(*settings)

    def _require_frozen(self) -> None:
        """Raises unless the weights around the adapter are those of the fit; reads them all."""
        for site in self.sites:
            site.check()  # a merged adapter has a message of its own
        now = self._frozen.now(self._peft_model)
        self._frozen.require_same(now, NotFittedError, "changed since fit: fit again", rounding=True)
        self._frozen = replace(now, fingerprints=self._frozen.fingerprints)

    def _at_noise(self, curvature: Curvature) -> Curvature:
        if self._is_regression and self.sigma_noise != 1:
            return curvature.scaled(1 / self.sigma_noise**2)
        return curvature

    def _resolve(self, prior_precision: PriorPrecision | None) -> Tensor:
        """The prior precision of each block; None for the current one."""
        value = self.prior_precision if prior_precision is None else prior_precision
        precisions = prior.resolve(value, _block_names(self.sites))
        prior.require_representable(float(precisions.min()), self.sites[0].A.dtype)
        return precisions

    def _priors(self, prior_precision: PriorPrecisions | None) -> tuple[Tensor, bool]:
        """One prior precision or a list of G: [n_blocks, G], and whether it is a list."""
        several = isinstance(prior_precision, Sequence) and not isinstance(prior_precision, str)
        tried = prior_precision if several else [prior_precision]
        if not tried:
            raise ValueError("prior_precision is an empty list")
        return torch.stack([self._resolve(value) for value in tried], 1), several  # type: ignore[union-attr, arg-type]

    def _evidence(self) -> Evidence:
        return Evidence(self._fitted(), self._prior_mean, self._is_regression)

    def _predictive_cotangents(self) -> Tensor:
        outputs = self._any_fit().n_outputs
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
        link = Link(check_choice("link_approx", link_approx, [m.value for m in Link]))
        if link is Link.MAP and not self._is_regression:
            with self._linearised() as linearised:
                precisions, several = self._priors(prior_precision)
                logits, labels = map_logits(linearised, loader, progress)
            probs = logits.softmax(-1)
            return probs.repeat(precisions.shape[1], 1, 1) if several else probs, labels
        mean, cov, labels = self._distribution(
            loader, self._predictive_cotangents(), prior_precision, progress
        )
        if self._is_regression:
            variance = cov.diagonal(dim1=-2, dim2=-1) + self.sigma_noise**2
            return (mean.expand_as(variance), variance), labels
        generator = torch.Generator().manual_seed(self.options.seed)
        return probabilities(link, mean, cov, n_samples, generator), labels

    def _distribution(
        self,
        loader: Iterable[Batch],
        cotangents: Tensor,
        prior_precision: PriorPrecisions | None,
        progress: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mean [N, K], covariance [N, K, K] (with a leading axis for a list of priors) and labels of a loader."""
        with self._linearised() as linearised:
            precisions, several = self._priors(prior_precision)
            mean, cov, labels = distribution(linearised, precisions, loader, cotangents, "predict", progress)
        if not cov.isfinite().all():
            raise NumericalError(
                f"the predictive covariance is not finite in {cov.dtype}: use a larger prior_precision"
            )
        if several:
            return mean, cov, labels
        return mean[0] if mean.dim() == 3 else mean, cov[0], labels

    @contextmanager
    def _linearised(self) -> Iterator[LinearisedModel]:
        """The linearised model, for a pass over data inside; raises as `_unchanged` does."""
        with self._unchanged() as fit:
            curvature = self._at_noise(fit.curvature)
            yield LinearisedModel(
                self.model, self._head, self.sites, fit.groups, curvature, self.likelihood, fit.n_outputs
            )


def _unlabelled(batch: Batch) -> list[Batch]:
    """A loader of one batch, without labels that nothing would use: test sets often have -1 there."""
    if not isinstance(batch, Mapping):
        return [batch]
    return [{key: value for key, value in batch.items() if key not in _LABELS}]


def _likelihood(name: str) -> Likelihood:
    kinds: dict[str, type[Likelihood]] = {kind.name: kind for kind in (Categorical, Gaussian)}
    return kinds[check_choice("likelihood", name, list(kinds))]()


def _block_names(sites: Sequence[Site]) -> list[BlockName]:
    return [(site.name, side) for site in sites for side in "AB"]
