"""The state behind `LaplaceLoRA`: what it was made with, what was fitted, and whether that still holds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from laplace_lora_fast.errors import LaplaceError, NotFittedError, UnsupportedAdapterError
from laplace_lora_fast.fitting.fit import Fit
from laplace_lora_fast.fitting.passes import Subject
from laplace_lora_fast.likelihoods import Likelihood
from laplace_lora_fast.model.adapters.trained import ALL, Trained
from laplace_lora_fast.model.contexts import undistributed, undisturbed_methods, unwrapped
from laplace_lora_fast.model.lora import (
    Treated,
    any_requires_grad,
    parameters_left_alone,
    read_adapter,
    trained_layers,
)
from laplace_lora_fast.model.observer import Layers
from laplace_lora_fast.model.storage import refuse_meta
from laplace_lora_fast.options import integer, named, positive_integer, positive_number, says_arguments
from laplace_lora_fast.posterior import Posterior
from laplace_lora_fast.prediction import LinearisedModel
from laplace_lora_fast.prior.evidence import MarginalLikelihood
from laplace_lora_fast.prior.precision import PriorPrecision, PriorPrecisions, resolve, resolve_several
from laplace_lora_fast.saving import posterior as saved_posterior
from laplace_lora_fast.saving.fingerprint import FittedOn
from laplace_lora_fast.structures import Structure
from laplace_lora_fast.structures.base import Curvature
from laplace_lora_fast.tasks import Task
from laplace_lora_fast.weights import LoraWeights, by_layer, is_head, matrices, weight_names

AUTO = "auto"
# PEFT's initialisations that take the adapter's start out of the base weights, or quantise them
_RESIDUAL_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@undisturbed_methods
class LaplaceState:
    """What a `LaplaceLoRA` was made with and what it has fitted; see there for the arguments."""

    @says_arguments
    def __init__(
        self,
        model: nn.Module,
        task: Task | str,
        *,
        structure: Structure | str = AUTO,
        prior_precision: PriorPrecision = 1.0,
        prior_mean: str | PathLike[str] | Mapping[str, Tensor] | None = None,
        layers: Layers = None,
        trained: Trained = None,
        budget: int | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.task: Task = named("task", task, Task)
        self.structure: Structure | str = (
            AUTO if structure == AUTO else named("structure", structure, Structure)
        )
        self.seed = integer("seed", seed)
        self.budget = None if budget is None else positive_integer("budget", budget)
        if (
            self.budget is not None
            and isinstance(self.structure, Structure)
            and not self.structure.uses_budget
        ):
            raise ValueError(f"{self.structure!r} keeps to no budget: leave it out")
        self._peft_model = unwrapped(model)
        refuse_meta(self._peft_model)
        self._head = self.task.head(self._peft_model)
        self._head.seed = self.seed
        self._refuse_estimate_of_estimate()
        self._selection, self._trained = layers, trained
        self.layers = trained_layers(self._peft_model, self._head, layers, trained)
        self._fit: Fit | None = None
        self._fitted_on: FittedOn | None = None
        self.prior_precision = prior_precision
        self._prior_mean = None if prior_mean is None else self._read_prior_mean(prior_mean)
        self._refuse_residual_base(self.layers)
        self._noise = self.likelihood.noise
        self._given_prior_mean = self._prior_mean

    @property
    def likelihood(self) -> Likelihood:
        """What the task's outputs say about the labels."""
        return self.task.likelihood

    @property
    def prior_precision(self) -> PriorPrecision:
        """A number, {"A": .., "B": .., "head": ..}, {"lora": .., "head": ..} or {layer name: ..}."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: PriorPrecision) -> None:
        if value is None:
            raise ValueError("prior_precision must be a number or a dict of numbers, got None")
        self._resolve(value)
        if isinstance(value, Mapping):
            self._prior_precision: PriorPrecision = {key: float(each) for key, each in value.items()}
        else:
            self._prior_precision = float(value)

    @property
    def sigma_noise(self) -> float | None:
        """The noise standard deviation of a regression, which its `scales` multiply; None before it is known."""
        return self._noise

    @sigma_noise.setter
    def sigma_noise(self, value: float) -> None:
        if not self.likelihood.has_noise:
            raise ValueError(f"{self.task!r} has no noise")
        self._noise = positive_number("sigma_noise", value)

    @property
    def parameters_left_alone(self) -> list[str]:
        """Names of trained parameters without a posterior: they keep their MAP value, without uncertainty.

        Biases, norms, embeddings, and what `layers` leaves out.
        """
        return parameters_left_alone(self._peft_model, self.layers)

    @property
    def posterior(self) -> Posterior:
        """The Gaussian over the LoRA weights at the current prior precision and noise."""
        return Posterior(at_noise(self._fitted().curvature, self._known_noise()), self._resolve(None))

    def snapshot(self) -> tuple[Fit, list[Tensor] | None]:
        """The fit, and the prior mean of each weight (None for zero): with the prior precision, a posterior."""
        return self._fitted(), self._prior_mean

    def restore(self, fit: Fit, prior_mean: list[Tensor] | None) -> None:
        """Takes over a posterior that was fitted on this adapter elsewhere, in the form `snapshot` gives.

        Raises:
            StateError: the fit is of another adapter, or damaged; names the layer.
        """
        saved_posterior.check(fit.curvature, self.layers)
        self._fit, self._prior_mean = fit, prior_mean
        self._fitted_on = FittedOn(self._peft_model, self.layers)

    def __repr__(self) -> str:
        arguments = [type(self._peft_model).__name__, repr(self.task), f"structure={self.structure!r}"]
        arguments.append(f"prior_precision={self.prior_precision!r}")
        if self._prior_mean is not None:
            arguments.append("prior_mean=..")
        for name, value in (
            ("layers", self._selection),
            ("trained", None if self._trained == ALL else self._trained),
            ("budget", self.budget),
            ("seed", self.seed or None),
        ):
            if value is not None:
                arguments.append(f"{name}={value!r}")
        state = f"fitted on {self._fit.n_examples} examples" if self._fit is not None else "not fitted"
        return f"LaplaceLoRA({', '.join(arguments)})  # {state}"

    def _read_prior_mean(self, source: str | PathLike[str] | Mapping[str, Tensor]) -> list[Tensor]:
        try:
            weights = read_adapter(_adapter_source(source), self.layers)
        except (UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
            if isinstance(error, LaplaceError):
                raise
            raise ValueError(
                f"prior_mean: the adapter in {str(source)!r} is damaged, or holds objects other than tensors, which "
                f"are not loaded as they may be code: save it as safetensors ({str(error).splitlines()[0]})"
            ) from error
        refits = isinstance(self.structure, Structure) and self.structure.starts_without_adapter
        if refits and any(bool(layer.B.any()) for layer in weights if isinstance(layer, LoraWeights)):
            raise ValueError(
                "refit=True starts from the model without its adapter: prior_mean must have lora_B = 0"
            )
        return matrices(weights)

    def _started(self, layers: list[Treated]) -> tuple[list[Treated], list[Tensor] | None]:
        """The layers, and the prior mean of their weights: of a refit's trained heads what they were before training.

        A refit starts from the model before training; the file that it is saved to keeps what its heads were.
        """
        refits = isinstance(self.structure, Structure) and self.structure.starts_without_adapter
        if not refits or not any(is_head(layer) for layer in layers):
            return layers, self._given_prior_mean
        mean = self._given_prior_mean
        if mean is None:
            mean = matrices(layer.before_training() for layer in layers)
        return starting(layers, mean), mean

    @property
    def _untrained(self) -> list[str]:
        """Weights of the selected layers that were not trained."""
        whole = trained_layers(self._peft_model, self._head, self._selection)
        treated = set(weight_names(self.layers))
        return [str(name) for name in weight_names(whole) if name not in treated]

    @property
    def _alone(self) -> list[str]:
        """Layers whose rows come from autograd: see `model.alone`."""
        found = self._head.layers_alone
        return [layer.name for layer in self.layers if layer.without_streams or layer.name in found]

    def _trained_names(self) -> str | list[str]:
        """The weights under the posterior, as `trained` takes them: flags on another model may say otherwise."""
        return list(map(str, weight_names(self.layers))) if self._untrained else ALL

    def _settings(self) -> dict[str, Any]:
        """What this was made with, as JSON. Raises TypeError for an option without a JSON form."""
        return saved_posterior.settings_of(
            self.task,
            self.structure,
            self.prior_precision,
            self._noise,
            None if self._selection is None else [layer.name for layer in self.layers],
            self._trained_names(),
            self.budget,
            self.seed,
        )

    def _described(self, layers: Sequence[Treated]) -> dict[str, Any]:
        """The same for comparison: layers by name; an option without a JSON form by its class."""
        try:
            settings = self._settings()
        except TypeError:
            settings = {"task": type(self.task).__name__, "structure": type(self.structure).__name__}
            settings |= {"prior_precision": self.prior_precision, "seed": self.seed, "budget": self.budget}
        return settings | {"layers": [layer.name for layer in layers]}

    def _refuse_estimate_of_estimate(self) -> None:
        """Raises ValueError for a structure that asks of labels drawn from the model what only given ones can say."""
        if not (self.likelihood.sampled and isinstance(self.structure, Structure)):
            return
        if self.structure.starts_without_adapter:
            raise ValueError(
                f"{self.task!r} is fitted with labels drawn from the model, which say nothing about an optimum: leave "
                "refit=True out"
            )
        if self.structure.fisher != "exact":
            raise ValueError(
                f"{self.task!r} draws its labels itself: leave fisher={self.structure.fisher!r} out"
            )

    def _refuse_residual_base(self, layers: Sequence[Treated]) -> None:
        if isinstance(self.structure, Structure) and self.structure.starts_without_adapter:
            _refuse_residual_base(self._peft_model, layers)

    def _current_layers(self) -> list[Treated]:
        """The LoRA layers with the adapter that is active now, which may be another one than at the last fit."""
        self.task.head(self._peft_model)  # refuses a model that has been trained for something else since
        trained = self._trained
        if trained is None and self._untrained and not any_requires_grad(self._peft_model):
            trained = self._trained_names()  # as was known before all was frozen
        layers = trained_layers(self._peft_model, self._head, self._selection, trained)
        now, former = ([layer.parameter_names for layer in each] for each in (layers, self.layers))
        if now != former:
            if self._given_prior_mean is not None:
                raise UnsupportedAdapterError(
                    f"prior_mean belongs to adapter {self.layers[0].adapter!r}, now {layers[0].adapter!r} is active: "
                    "make a new LaplaceLoRA"
                )
            resolve(self.prior_precision, weight_names(layers))
        self._refuse_residual_base(layers)
        return layers

    def _any_fit(self) -> Fit:
        """The fit, even if the model has changed since."""
        if self._fit is None:
            raise NotFittedError("call fit(train_loader) or load(...) first")
        return self._fit

    def _fitted(self) -> Fit:
        """The fit, if it belongs to the model as it is now; waits for the device."""
        with self._unchanged() as fitted:
            return fitted

    @contextmanager
    def _unchanged(self) -> Iterator[Fit]:
        """The fit, for use inside. Raises NotFittedError if the model has changed."""
        fitted = self._any_fit()
        assert self._fitted_on is not None
        with self._fitted_on.unchanged(fitted.curvature):
            yield fitted

    def _marginal_likelihood(self) -> MarginalLikelihood:
        return MarginalLikelihood(self._any_fit(), self._prior_mean, self.likelihood)

    def _known_noise(self) -> float:
        """The noise in force, 1 where there is none."""
        if not self.likelihood.has_noise:
            return 1.0
        if self._noise is None:
            raise NotFittedError(
                "the noise is not known: fit with 'labels' in every batch, or pass Regression(noise=..)"
            )
        return self._noise

    def _resolve(self, prior_precision: PriorPrecision | None) -> Tensor:
        """The prior precision of each weight, [n_weights]; None for the current one."""
        return self._priors(prior_precision)[0][:, 0]

    def _priors(self, prior_precision: PriorPrecisions | None) -> tuple[Tensor, bool]:
        """One prior precision or a list of G: [n_weights, G], and whether it is a list; None for the current one."""
        value = self.prior_precision if prior_precision is None else prior_precision
        names = weight_names(self.layers)
        # of the fit's weights where there is one: the adapter may be gone, which is for `_unchanged` to say
        weight = self.layers[0].weights.matrices[0] if self._fit is None else self._fit.curvature.means[0]
        return resolve_several(value, names, weight.dtype)

    @contextmanager
    def _linearised(self, noise: float) -> Iterator[LinearisedModel]:
        """The linearised model at a noise, for a pass over data inside; raises as `_unchanged` does."""
        with self._unchanged() as fitted:
            yield LinearisedModel(
                Subject(undistributed(self.model), self._head, self.layers, self.likelihood),
                fitted.structure,
                at_noise(fitted.curvature, noise),
                fitted.shared_inputs,
                fitted.n_outputs,
            )


def starting(layers: Sequence[Treated], means: Sequence[Tensor]) -> list[Treated]:
    """The layers with these weights [r, d] before training."""
    pairs = zip(layers, by_layer(means, layers), strict=True)
    return [layer.starting_from(mean) for layer, mean in pairs]


def at_noise(curvature: Curvature, noise: float) -> Curvature:
    """The curvature of a Gaussian likelihood with another noise than 1."""
    return curvature if noise == 1 else curvature.scaled(1 / noise**2)


def _adapter_source(adapter: str | PathLike[str] | Mapping[str, Tensor]) -> Path | Mapping[str, Tensor]:
    """An adapter's folder or state dict. A path that is no such folder must not become a look-up on a model hub."""
    if isinstance(adapter, Mapping):
        return {re.sub(r"^((_orig_mod|module)\.)+", "", name): weight for name, weight in adapter.items()}
    folder = Path(adapter)
    if not any((folder / f"adapter_model.{suffix}").is_file() for suffix in ("safetensors", "bin")):
        raise ValueError(f"prior_mean: the folder {str(folder)!r} has no adapter_model.safetensors")
    return folder


def _refuse_residual_base(model: nn.Module, layers: Sequence[Treated]) -> None:
    """Raises ValueError if the model without its adapter is not the pre-trained one, from which a refit starts."""
    configs = getattr(model, "peft_config", {})
    for adapter in dict.fromkeys(layer.adapter for layer in layers):
        init = str(getattr(configs.get(adapter), "init_lora_weights", True)).lower()
        if init.startswith(_RESIDUAL_BASE):
            raise ValueError(
                f"refit=True starts from the model without its adapter, which init_lora_weights={init!r} made a "
                "residual of the pre-trained one: use Rows(), or save the adapter converted to plain LoRA "
                "(path_initial_model_for_weight_conversion)"
            )
