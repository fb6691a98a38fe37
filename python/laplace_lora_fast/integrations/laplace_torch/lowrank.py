"""`Laplace(model, likelihood, "all", "lowrank_kron")`: laplace-torch's interface on this package's LoRA posterior."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from laplace.baselaplace import ParametricLaplace
from laplace.curvature import CurvatureInterface
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import laplace_kernels as lk
from laplace_lora_fast.errors import NotFittedError, UnsupportedAdapterError
from laplace_lora_fast.fitting.fit import fit
from laplace_lora_fast.fitting.passes import Subject
from laplace_lora_fast.integrations.laplace_torch.curvature import FastEF, FastGGN, X
from laplace_lora_fast.likelihoods import Gaussian, by_name
from laplace_lora_fast.model.linear import BatchHead
from laplace_lora_fast.model.lora import lora_layers
from laplace_lora_fast.options import DEFAULT_BUDGET
from laplace_lora_fast.prediction import LinearisedModel, distribution
from laplace_lora_fast.ranks import Ranks
from laplace_lora_fast.structures import KFAC
from laplace_lora_fast.structures.base import Problem
from laplace_lora_fast.structures.blocks.algebra import KronBlock
from laplace_lora_fast.structures.blocks.curvature import BlockCurvature
from laplace_lora_fast.weights import WeightName, from_flat, to_flat


class LowRankKron:
    """A precision: curvature of LoRA weights in the eigenbasis of its factors, plus a multiple of 1 for each weight.

    Each large factor is low-rank plus a tail, so nothing of size d x d exists. The methods are those that laplace-torch
    asks of a Kronecker precision.

    Args:
        curvature: of every LoRA weight, in the order of the parameters.
        deltas: [n_blocks], [1] or scalar; None for zero.
    """

    def __init__(self, curvature: BlockCurvature, deltas: Tensor | None = None) -> None:
        self.curvature = curvature
        self.blocks = [block for block in curvature.blocks if isinstance(block, KronBlock)]
        self._sides = [side for _, side in curvature.names]
        zero = torch.zeros((), dtype=torch.float64, device=self.blocks[0].mean.device)
        self.deltas = (zero if deltas is None else deltas).expand(len(self.blocks))

    def __len__(self) -> int:
        return len(self.blocks)

    def __mul__(self, scalar: float | Tensor) -> LowRankKron:
        """The curvature times `scalar`; the deltas stay, as in laplace-torch."""
        return LowRankKron(self.curvature.scaled(scalar), self.deltas)

    __rmul__ = __mul__

    def __add__(self, deltas: Tensor) -> LowRankKron:
        """Adds a multiple of 1: a scalar, or one for each weight."""
        return LowRankKron(self.curvature, self.deltas + deltas)

    __radd__ = __add__

    def detach(self) -> LowRankKron:
        """Without a graph to the deltas."""
        return LowRankKron(self.curvature, self.deltas.detach())

    def logdet(self) -> Tensor:
        """Log determinant, differentiable in deltas and scalar."""
        terms = []
        for block, delta in zip(self.blocks, self.deltas, strict=True):
            values, counts = block.eigenvalues()
            terms.append((counts * (values + delta).log()).sum())
        return torch.stack(terms).sum()

    def log_det_ratio(self) -> Tensor:
        """Log determinant minus that of the deltas alone, without cancellation."""
        terms = []
        for block, delta in zip(self.blocks, self.deltas, strict=True):
            values, counts = block.eigenvalues()
            terms.append((counts * (values / delta).log1p()).sum())
        return torch.stack(terms).sum()

    def bmm(self, W: Tensor, exponent: float = -1) -> Tensor:
        """precision^exponent applied to vectors W [..., P]."""
        flat = W.reshape(-1, W.shape[-1])
        parts, start = [], 0
        for block, side, delta in zip(self.blocks, self._sides, self.deltas.detach().tolist(), strict=True):
            weights = flat[:, start : start + block.mean.numel()]
            start += block.mean.numel()
            parts.append(
                to_flat(side, block.apply_power(from_flat(side, weights, block.shape), exponent, delta))
            )
        return torch.cat(parts, 1).reshape(W.shape).to(W.dtype)

    def inv_square_form(self, Js: Tensor) -> Tensor:
        """J precision^-1 J^T of Js [B, C, P], [B, C, C]."""
        return Js @ self.bmm(Js).mT

    def diag(self, exponent: float = 1) -> Tensor:
        """Diagonal [P] of precision^exponent."""
        parts = []
        for block, side, delta in zip(self.blocks, self._sides, self.deltas.detach().tolist(), strict=True):
            kept = (block.core + delta) ** exponent
            tail = ((block.tail + delta) ** exponent)[:, None]
            small, large = block.small_vectors.square(), block.large.vectors.double().square()
            entries = small @ ((kept - tail) @ large.mT + tail)  # the tail's projector is 1 - U U^T
            parts.append(to_flat(side, entries))
        return torch.cat(parts)


class LowRankKronLaplace(ParametricLaplace):
    """Kronecker-factored Laplace posterior over LoRA weights with low-rank large factors.

    `fit` makes one pass with sketched factors where dense ones exceed `memory_budget`; predictions form the Jacobians'
    projections only (`joint=True` does need the dense Jacobian). The prior precision is a scalar or one per parameter.
    The Fisher is that of the backend: exact for `FastGGN`, sampled with its `stochastic`, empirical for `FastEF`.

    Args:
        model: model(batch) gives logits [N, C]; exactly its LoRA weights require grad.
        likelihood: "classification" or "regression".
        sigma_noise: as in laplace-torch.
        prior_precision: scalar or one per parameter.
        prior_mean: as in laplace-torch.
        temperature: as in laplace-torch.
        dict_key_x: as in laplace-torch.
        dict_key_y: as in laplace-torch.
        backend: `FastGGN` or `FastEF`; None for `FastGGN`.
        backend_kwargs: of the backend.
        structure: options of the factors; its Fisher is the backend's.
        budget: bytes of dense factors.

    Raises:
        UnsupportedAdapterError: parameters other than the active adapter's LoRA weights require grad.
        ValueError: another likelihood or backend.
    """

    _key = ("all", "lowrank_kron")

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        *,
        structure: KFAC | None = None,
        budget: int = DEFAULT_BUDGET,
    ) -> None:
        backend = FastGGN if backend is None else backend
        if likelihood not in ("classification", "regression"):
            raise ValueError(
                f"lowrank_kron has likelihood 'classification' or 'regression', got {likelihood!r}"
            )
        if not issubclass(backend, FastGGN | FastEF):
            raise ValueError(f"lowrank_kron has backend FastGGN or FastEF, got {backend.__name__}")
        self._structure, self._budget = KFAC() if structure is None else structure, budget
        self._head = BatchHead(model)
        self._layers = lora_layers(model, self._head)
        self._shared_inputs: list[int] = []
        super().__init__(
            model,
            likelihood,
            sigma_noise,
            prior_precision,
            prior_mean,
            temperature,
            False,
            dict_key_x,
            dict_key_y,
            backend,
            backend_kwargs,
        )
        self._check_parameters()
        self._structure = replace(self._structure, fisher=self.backend.fisher)  # type: ignore[attr-defined]

    def _check_parameters(self) -> None:
        """The blocks of the LoRA layers are the parameters, in the same order."""
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        expected = [name for layer in self._layers for name in layer.parameter_names.values()]
        if names != expected:
            odd = sorted(set(names) ^ set(expected))[:3]
            raise UnsupportedAdapterError(
                f"lowrank_kron treats exactly the active adapter's LoRA weights; differing: {odd}. Set requires_grad "
                "on those and on nothing else"
            )

    @property
    def _dtype(self) -> torch.dtype:
        """Of the prior: never half precision, whatever the base model is in."""
        return lk.accumulation_dtype(self.params[0].dtype)

    def _init_H(self) -> None:
        self.H: LowRankKron | None = None

    def fit(self, train_loader: Iterable[Any], override: bool = True, progress_bar: bool = False) -> None:
        """Fits the posterior in one pass.

        Args:
            train_loader: batches (x, y), or mappings that hold the targets under `dict_key_y`.
            override: must be True: eigenvectors of two fits do not add up.
            progress_bar: show a bar.

        Raises:
            ValueError: override is False.
            InvalidBatchError: the loader is empty or a batch is unusable.
        """
        if not override:
            raise ValueError("lowrank_kron does not continue a fit: pass override=True")
        likelihood = by_name(self.likelihood)
        problem = Problem([layer.weights for layer in self._layers], likelihood, self._budget, 0, Ranks())
        subject = Subject(self.model, self._head, self._layers, likelihood)
        fitted = fit(subject, self._structure, problem, self._batches(train_loader), "", progress_bar)
        assert fitted.log_likelihood is not None
        assert isinstance(fitted.curvature, BlockCurvature)
        self.mean = parameters_to_vector(self.params).detach()
        self.H, self._shared_inputs = LowRankKron(fitted.curvature), fitted.shared_inputs
        self.loss, self.n_data = -fitted.log_likelihood, fitted.n_examples
        self.n_outputs = self.model.output_size = fitted.n_outputs

    @property
    def prior_precision(self) -> Tensor:
        """[1], or one for each parameter."""
        precision: Tensor = self._prior_precision
        return precision

    @prior_precision.setter
    def prior_precision(self, value: float | Tensor) -> None:
        ParametricLaplace.prior_precision.fset(self, value)
        if len(self.prior_precision) not in (1, self.n_layers):
            raise ValueError(
                f"prior_precision of lowrank_kron has length 1 or {self.n_layers}, got {len(self.prior_precision)}"
            )

    @property
    def posterior_precision(self) -> LowRankKron:
        """Curvature plus prior."""
        curvature: LowRankKron = self._fitted() * self._H_factor
        return curvature + self.prior_precision

    @property
    def log_det_posterior_precision(self) -> Tensor:
        return self.posterior_precision.logdet()

    @property
    def log_det_ratio(self) -> Tensor:
        return self.posterior_precision.log_det_ratio()

    def square_norm(self, value: Tensor) -> Tensor:
        """(value - mean)^T precision (value - mean)."""
        delta = value - self.mean
        return delta @ self.posterior_precision.bmm(delta, exponent=1)

    def functional_variance(self, Js: Tensor) -> Tensor:
        """Covariance [B, C, C] of outputs from dense Jacobians [B, C, P]."""
        return self.posterior_precision.inv_square_form(Js)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """Covariance [B C, B C] of the outputs of a batch from dense Jacobians [B, C, P]."""
        self._check_jacobians(Js)
        return self.posterior_precision.inv_square_form(Js.reshape(1, -1, Js.shape[-1]))[0]

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Weights [n_samples, P] drawn from the posterior."""
        noise = torch.randn(
            n_samples, self.n_params, device=self._device, dtype=self.mean.dtype, generator=generator
        )
        return self.mean + self.posterior_precision.bmm(noise, exponent=-0.5)

    def _glm_predictive_distribution(
        self, X: X, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        if joint:
            jacobians, mean = self.backend.jacobians(X)
            return mean.flatten(), self.functional_covariance(jacobians)
        precision = self.posterior_precision.detach()
        linearised = LinearisedModel(
            Subject(self.model, self._head, self._layers, Gaussian()),
            self._structure,
            precision.curvature,
            self._shared_inputs,
            self.n_outputs,
        )
        deltas = precision.deltas.double().cpu()[:, None]
        (block,) = distribution(linearised, deltas, [{"x": X, "y": None}], plain_outputs=True)
        variance = block.cov[0]
        return block.mean, variance.diagonal(dim1=-2, dim2=-1) if diagonal_output else variance

    def state_dict(self) -> dict[str, Any]:
        """laplace-torch's state; "H" is a dict of tensors and names, so `torch.load` stays safe."""
        curvature = self._fitted().curvature
        state: dict[str, Any] = super().state_dict()
        state["H"] = {"names": [tuple(name) for name in curvature.names], "tensors": curvature.tensors()}
        state["shared_inputs"] = self._shared_inputs
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave, on the same model."""
        super().load_state_dict(state_dict)
        self._shared_inputs = list(state_dict["shared_inputs"])
        names = [WeightName(*name) for name in state_dict["H"]["names"]]
        devices = [self._device] * len(names)
        self.H = LowRankKron(BlockCurvature.from_tensors(names, state_dict["H"]["tensors"], devices))

    def _batches(self, loader: Iterable[Any]) -> Iterator[dict[str, Any]]:
        for data in loader:
            x, y = (data, data[self.dict_key_y]) if isinstance(data, Mapping) else data
            x = x.to(self._device) if isinstance(x, Tensor) else x
            yield {"x": x, "y": y}

    def _fitted(self) -> LowRankKron:
        if self.H is None:
            raise NotFittedError("call fit(train_loader) or load_state_dict(...) first")
        return self.H
