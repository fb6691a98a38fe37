"""LaplaceLoRA: fit, tune the prior, predict, sample, save. The facade; no arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from laplace_lora_fast.errors import LaplaceError, StateError
from laplace_lora_fast.fitting.checkpoint import Checkpoint
from laplace_lora_fast.fitting.choose import choose
from laplace_lora_fast.fitting.finite import NON_FINITE
from laplace_lora_fast.fitting.fit import fit
from laplace_lora_fast.fitting.passes import Loader, Subject
from laplace_lora_fast.model.contexts import undistributed, undisturbed_methods
from laplace_lora_fast.options import (
    DEFAULT_BUDGET,
    check_choice,
    named,
    positive_integer,
)
from laplace_lora_fast.posterior import (
    HeadFactors,
    LayerFactors,
    Posterior,
    Summary,
    layer_factors,
    summarise,
)
from laplace_lora_fast.prediction import LinearisedModel
from laplace_lora_fast.prior.evidence import Evidence
from laplace_lora_fast.prior.precision import PriorPrecision
from laplace_lora_fast.prior.tuning import Fitted, Tuning
from laplace_lora_fast.ranks import Ranks
from laplace_lora_fast.sampling.lengths import AdapterSamples, Lengths, gaps
from laplace_lora_fast.sampling.samples import PosteriorSamples
from laplace_lora_fast.saving import adapters, agreement, tokenizers
from laplace_lora_fast.saving import posterior as saved_posterior
from laplace_lora_fast.saving.checked import MALFORMED
from laplace_lora_fast.saving.fingerprint import FittedOn
from laplace_lora_fast.saving.recorder import recording
from laplace_lora_fast.structures import Structure
from laplace_lora_fast.structures.base import Problem
from laplace_lora_fast.tasks import Task
from laplace_lora_fast.text.predictive import LaplaceText


@undisturbed_methods
class LaplaceLoRA(LaplaceText):
    """Laplace posterior over what a PEFT model was trained in (Yang, Robeyns, Wang, Aitchison, ICLR 2024).

    The posterior is Gaussian around the trained adapter, over its LoRA weights and the linear layers trained beside
    them (`modules_to_save`: a classifier's head); its precision is the Fisher information, exact or Kronecker-factored
    (see `structure`), plus the prior's. Predictions come from the model linearised in these weights. Other trained
    parameters (biases, norms, embeddings) keep their values: see `parameters_left_alone`.

        la = LaplaceLoRA(model, Answers(token_ids))
        la.fit(train_loader)
        la.optimize_prior_precision(HeldOut(val_loader))
        probs = la.predict(batch)

    Args:
        model: a PEFT model with one active LoRA adapter. Never changed.
        task: what the model answers: `Answers(token_ids)`, `Options()`, `Classes()`, `MultiLabel()`, `Regression()`,
            `Preference()`, `Tokens()`, `Outputs(fn)`.
        structure: of the curvature: `Rows(..)`, `LowRank(..)`, `KFAC(..)`, `EKFAC(..)`, `Diagonal(..)`, or their short
            names. "auto": exact rows where they are fewer than the weights and than 4,096 and fit the budget, else
            their leading directions where the budget holds 256, else KFAC.
        prior_precision: a number, {"A": .., "B": .., "head": ..}, {"lora": .., "head": ..}, or {layer name: ..}.
        prior_mean: None for zero, or the adapter the training started from: a PEFT folder or state dict. A trained head
            that is not in it is centred on what PEFT has kept of it from before training, as it always is for
            `Rows(refit=True)`, which starts from there.
        layers: which LoRA layers and trained heads get a posterior; the others keep their MAP value. None for all,
            "last" (the trained or adapted output head, or else the last decoder or encoder layer), a list of names, or
            a predicate on names: `lambda name: "modules_to_save" not in name` leaves trained heads out.
        trained: which of these layers' weights were trained, and so have a posterior; the others keep their values.
            None goes by `requires_grad` where any weight of the adapter requires gradients, as after training (LoRA-FA
            freezes every lora_A), and takes all where none does, as in an adapter that was loaded for inference. "all",
            a list of names as `summary` has them, or a predicate on those: `lambda name: name.endswith("lora_B")`.
        budget: bytes that the structure may keep on the device; None for 4 GiB.
        seed: of sampled labels, sketches, Monte-Carlo predictions and posterior samples.

    Attributes:
        task: as passed.
        structure: as passed; "auto" until a fit has chosen.
        layers: the LoRA layers and trained heads, in the order of `model.named_modules()`.

    Raises:
        UnsupportedAdapterError: no LoRA layer, or one this does not cover; names the layer.
        ValueError: an argument is not one of its choices, or would not be looked at.
    """

    def fit(
        self,
        train_loader: Loader,
        *,
        group: ProcessGroup | None = None,
        checkpoint: str | PathLike[str] | Checkpoint | None = None,
        non_finite: str = "raise",
        progress: bool = True,
    ) -> LaplaceLoRA:
        """Fits the posterior: one pass over the training data, rank-of-Hessian backward passes a batch.

        The posterior belongs to the model as it is now, and later uses refuse another one. Every use compares the
        adapter's weights and scalings. Frozen weights are compared when `save` is called, on loading, and where a
        write was counted: fused optimisers, which count none, train LoRA weights with them.

        Args:
            train_loader: batches as transformers makes them: dicts with `input_ids`, `attention_mask`, `labels`.
                Labels ([N] class indices, or regression targets) are needed for the evidence, the noise of a
                regression, `Rows(refit=True)` and the empirical Fisher only.
            group: process group of torch.distributed, `torch.distributed.group.WORLD` say, whose ranks fit together:
                each passes the batches of its own share of the data and holds the same model, and leaves with the
                posterior of all of the data; a share may be empty. None: this process alone.
            checkpoint: a folder, or `Checkpoint(folder, seconds)`, to write to how far the fit has come, every 300
                seconds unless told otherwise. The same call after a killed one goes on there, with bitwise the result
                of one that was not killed, if the loader gives the same batches in the same order; those taken in
                before are read again and compared. Removed when the fit has succeeded.
            non_finite: what becomes of a batch whose numbers are not: "raise", or "skip", which leaves it out, counts
                it and holds a batch's streams of all layers in memory until they have been looked at.
            progress: show a bar.

        Returns:
            self.

        Raises:
            InvalidBatchError: the loader is empty, or a batch is unusable.
            NumericalError: numbers are not finite; names the layer and the batch.
            OSError: the checkpoint cannot be written; the last one is still there.
            RankError: another rank of `group` failed, or holds another model.
            StateError: the checkpoint is damaged, of another version, of another fit, or of one on other data.
            UnsupportedAdapterError: the active adapter is one this does not cover, or not the one of `prior_mean`.
            ValueError: `prior_precision` names other layers than the active adapter has, or the budget is too small for
                the structure in its smallest form.
        """
        ranks = Ranks(group)
        with ranks.together():
            check_choice("non_finite", non_finite, NON_FINITE)
            layers, prior_mean = self._started(self._current_layers())
            fitted_on = FittedOn(self._peft_model, layers)
            facts = agreement.facts(self._described(layers), layers, fitted_on.surroundings, prior_mean)
        ranks.agree(facts)
        self._head.expect_fit()
        subject = Subject(undistributed(self.model), self._head, layers, self.likelihood)
        problem = Problem(
            layers=[layer.weights for layer in layers],
            likelihood=self.likelihood,
            budget=DEFAULT_BUDGET if self.budget is None else self.budget,
            seed=self.seed,
            ranks=ranks,
        )
        wanted = self.structure if isinstance(self.structure, Structure) else None
        structure, reason, problem, train_loader = choose(subject, wanted, problem, train_loader, progress)
        facts |= {"the chosen structure": repr(structure), "non_finite": non_finite}
        with recording(checkpoint, facts, ranks) as recorder:
            fitted = fit(
                subject,
                structure,
                problem,
                train_loader,
                reason,
                progress,
                recorder=recorder,
                non_finite=non_finite,
            )
            with ranks.together():
                fitted_on.fitted()
        self._fit, self._fitted_on, self.layers, self._prior_mean = fitted, fitted_on, layers, prior_mean
        if self.likelihood.has_noise and self._noise is None and self._fit.log_likelihood is not None:
            self._noise = self._marginal_likelihood().best_noise(self._resolve(None))
        return self

    @property
    def factors(self) -> dict[str, LayerFactors | HeadFactors]:
        """For each layer the Kronecker factors of lora_A and lora_B, or of a trained head, at unit noise.

        Raises:
            ValueError: the structure has none.
        """
        return layer_factors(self._fitted().curvature, self.layers)

    def log_marginal_likelihood(self, prior_precision: PriorPrecision | None = None) -> Tensor:
        """Laplace's estimate of log p(D | prior), fp64 scalar.

        Args:
            prior_precision: evaluates another one than the current.

        Raises:
            NotFittedError: before `fit`, or fitted on batches without labels.
        """
        self._fitted()
        noise = self._known_noise() if self.likelihood.has_noise else None
        return self._marginal_likelihood().at(self._resolve(prior_precision), noise)

    def optimize_prior_precision(
        self, tuning: Tuning | str | None = None, *, progress: bool = True
    ) -> PriorPrecision:
        """Chooses the prior precision, and the noise of `Regression()` with it; sets and returns the former.

        Args:
            tuning: `HeldOut(loader)`, which held wherever it was measured; `CrossFit(train, data)`, without held-out
                data, by training again; `Evidence()`, without either, which held after `Rows(refit=True)` wherever it
                was measured and is a poor guide for an over-trained adapter without; `LeaveOneOut()`, after
                `Rows(refit=True)`, which did not hold everywhere. None: `Evidence()`.
            progress: show a bar.

        Raises:
            NumericalError: there is no optimum.
            ValueError: this way of tuning does not go with the fit.
        """
        fitted = self._fitted()
        if tuning is None:
            tuning = Evidence()
        way: Tuning = named("tuning", tuning, Tuning)
        tuned = way.choose(
            Fitted(
                fitted,
                self._prior_mean,
                self.likelihood,
                self._noise,
                self._linearised,
                self._elsewhere,
                self.layers[0].weights.matrices[0].dtype,
                self.seed,
            ),
            progress,
        )
        self.prior_precision = tuned.prior_precision
        self._noise = self._noise if tuned.noise is None else tuned.noise
        return self.prior_precision

    def _elsewhere(
        self, model: nn.Module, loader: Loader, noise: float
    ) -> AbstractContextManager[LinearisedModel]:
        """Another model linearised at a noise, with a posterior fitted on a loader as this one was."""
        structure = self._any_fit().structure
        other = LaplaceLoRA(
            model,
            self.task,
            structure=structure,
            layers=self._selection,
            trained=self._trained,
            budget=self.budget if structure.uses_budget else None,
            seed=self.seed,
        )
        return other.fit(loader, progress=False)._linearised(noise)

    def sample_adapters(
        self,
        folder: str | PathLike[str],
        n: int,
        *,
        directions: str = "all",
        prior_precision: PriorPrecision | None = None,
        check: Loader | None = None,
        force: bool = False,
    ) -> AdapterSamples:
        """Draws n adapters from the posterior and writes them as ordinary PEFT adapter folders.

        For tools that take adapters only: `predict`, `uncertainty` and `generate` are better, as the posterior is that
        of the linearised model. Samples that are longer than the adapter itself, which is known before any pass, are
        refused: there the model is another one.

        Args:
            folder: of the new folders; does not exist, or is empty. All n are there in the end, or none.
            n: how many, at least 1.
            directions: "all", or "data": samples move in the span of the training data's Jacobian rows only, which
                makes them far shorter, keeps all of the training examples' variance, and loses some of it elsewhere.
            prior_precision: another one than the current; a larger one makes samples shorter.
            check: a few batches to measure on how far each sample's model is from the linearised one; printed.
            force: whether samples of any length are written.

        Returns:
            The folders, loadable by `peft.PeftModel.from_pretrained`: a list with `lengths`, `gaps` and `report`.

        Raises:
            FileExistsError: `folder` is not empty.
            UnsupportedAdapterError: the model is no PeftModel, or has several adapters active.
            ValueError: `n` is no positive integer, the samples are too long, or the structure has none of this kind.
        """
        n, precisions = positive_integer("n", n), self._resolve(prior_precision)
        posterior = Posterior(self.posterior.curvature, precisions)
        samples = posterior.sample(n, torch.Generator().manual_seed(self.seed), directions)
        means = posterior.curvature.means
        steps = [sample - mean.to(sample) for sample, mean in zip(samples, means, strict=True)]
        subject = Subject(self.model, self._head, self.layers, self.likelihood)
        drawn = PosteriorSamples(subject, steps, self._unchanged, f"directions={directions!r}")
        lengths = Lengths.of(drawn.norms, means, precisions)
        if not force:
            lengths.require_near(
                _shorter(
                    self.prior_precision if prior_precision is None else prior_precision,
                    lengths.needed,
                    directions,
                )
            )
        if check is not None and self.likelihood.sampled:
            raise ValueError(f"{self.task!r} has no outputs to check samples by: leave check out")
        found = None if check is None else gaps(drawn, check)
        folders = adapters.save_samples(self._peft_model, self.layers, samples, folder)
        written = AdapterSamples(folders, lengths, found)
        if check is not None:
            print(written.report)
        return written

    def save(self, folder: str | PathLike[str], *, tokenizer: Any = None) -> None:
        """Writes the posterior to `folder`/posterior.safetensors. The adapter itself is PEFT's to save.

        Args:
            folder: made where it is missing.
            tokenizer: that the batches came from, so that `load` can refuse another one; none is kept, but digests.
        """
        fitted = self._fitted()
        assert self._fitted_on is not None
        self._fitted_on.require_all()
        scalings = [layer.scaling for layer in self.layers]
        texts = None if tokenizer is None else tokenizers.described(tokenizer)
        settings = self._settings()
        saved_posterior.save(folder, fitted, self._prior_mean, settings, scalings, self._fitted_on, texts)

    @classmethod
    def load(
        cls,
        folder: str | PathLike[str],
        model: nn.Module,
        *,
        task: Task | None = None,
        tokenizer: Any = None,
    ) -> LaplaceLoRA:
        """Reads a posterior that `save` wrote.

        Args:
            folder: what was passed to `save`.
            model: the model with the same adapter it was fitted on.
            task: the task it was fitted with, where that holds code, as `Outputs` does; None otherwise.
            tokenizer: that batches will come from; compared where `save` was told one.

        Raises:
            StateError: the file is missing, truncated or of another format; or the model has other LoRA layers,
                weights or scalings, or other base weights or trained modules around them, or the tokenizer is another;
                says which.
            ValueError: `task` is needed and missing, or not the one of the fit.
        """
        saved = saved_posterior.load(folder)
        settings = saved.settings(task)
        if tokenizer is not None and saved.header.get("tokenizer") is not None:
            tokenizers.require_same(saved.header["tokenizer"], tokenizer)
        noise = settings.pop("noise")
        try:
            la = cls(model, **settings)
        except LaplaceError:
            raise
        except MALFORMED as error:
            raise StateError(f"the posterior's settings do not fit: {error}") from error
        fitted, prior_mean = saved.rebuild(la.layers, la.likelihood)
        saved_posterior.check(fitted.curvature, la.layers)
        la._fit, la._noise = fitted, noise
        la._prior_mean = la._given_prior_mean = prior_mean
        la.layers, _ = la._started(la.layers)
        la._fitted_on = saved.fitted_on(la._peft_model, la.layers)
        la._head.expect_fit()
        return la

    def summary(self) -> Summary:
        """What was fitted, as a table: per LoRA weight its shape, what is kept, effective number of parameters."""
        fitted = self._fitted()
        return summarise(
            self.posterior,
            repr(self),
            self.prior_precision,
            self._noise,
            self.parameters_left_alone,
            repr(fitted.structure),
            fitted.reason,
            fitted.n_skipped,
            self._untrained,
            self._alone,
        )


def _shorter(prior_precision: PriorPrecision, factor: float, directions: str) -> str:
    """What makes samples shorter."""
    if isinstance(prior_precision, Mapping):
        larger = f"prior precisions {factor:.3g} times as large"
    else:
        larger = f"prior_precision={prior_precision * factor:.3g} or more"
    return larger if directions == "data" else f"{larger}, directions='data' (the span of the training rows)"
