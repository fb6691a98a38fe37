"""`FastGGN` and `FastEF`: one forward pass and as few backward passes as the Fisher allows, for linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from laplace.curvature import CurvatureInterface, EFInterface, GGNInterface
from laplace.utils import Kron
from torch import Tensor, nn

import laplace_kernels as lk
from laplace_lora_fast.fitting.passes import BatchStep, Subject, run
from laplace_lora_fast.integrations.laplace_torch.shared import SharedKron
from laplace_lora_fast.integrations.linear import ParameterJacobians, UsesSeen, selected
from laplace_lora_fast.likelihoods import Fisher, Gaussian, MonteCarlo, by_name
from laplace_lora_fast.model.linear import BatchHead, LinearLayer, locate
from laplace_lora_fast.structures.base import Listener, Step
from laplace_lora_fast.structures.blocks.kfac import TokenSharing

X: TypeAlias = Tensor | Mapping[str, Any]


class _FastInterface(CurvatureInterface):
    """What `FastGGN` and `FastEF` share: one forward pass and as many backward passes as the Fisher has cotangents."""

    def _prepare(self, kfac_approx: str, mc_samples: int, seed: int) -> None:
        self.kfac_approx = TokenSharing(kfac_approx)
        self.mc_samples = mc_samples
        self._generator = torch.Generator().manual_seed(seed)
        self._head = BatchHead(self.model)
        self._layers, self._places = locate(self.model, self.params)
        self._n_params = sum(parameter.numel() for parameter in self.params)
        self._likelihood = by_name(self.likelihood)
        self._all_uses_seen = False

    @property
    def fisher(self) -> Fisher:
        """Which Fisher information this backend computes."""
        raise NotImplementedError

    def kron(
        self, x: X, y: Tensor, N: int, kfac_approx: str | None = None, mc_samples: int | None = None
    ) -> tuple[Tensor, Kron]:
        """KFAC of one batch, as a summand of the data set's.

        Args:
            x: what the model takes.
            y: targets.
            N: number of examples of the data set.
            kfac_approx: "expand" or "reduce", instead of the backend's.
            mc_samples: instead of the backend's.

        Returns:
            Sum of the losses, and factors [gradient, input] of every weight and [gradient] of every bias.
        """
        mode = self.kfac_approx if kfac_approx is None else TokenSharing(kfac_approx)
        listener = _KronListener(self._layers, mode, self._fisher_cotangents(mc_samples))
        f = self._pass(listener, x, y)
        factors = [listener.factors(place.layer, place.bias, N) for place in self._places]
        return self._loss(f, y), SharedKron(factors)

    def full(self, x: X, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Sum of the losses, and the curvature [P, P] of one batch."""
        rows, f = self._jacobian_rows(x, self._fisher_cotangents(), y)
        rows = rows.flatten(0, 1)
        return self._loss(f, y), rows.mT @ rows

    def diag(self, x: X, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Sum of the losses, and the curvature's diagonal [P] of one batch. No Jacobian of the whole model is held."""
        parts: dict[int, Tensor] = {}

        def add(parameter: int, k: int, jacobian: Tensor) -> None:
            parts[parameter] = parts.get(parameter, 0) + jacobian.square().sum(0)

        f = self._pass(ParameterJacobians(self._places, self._fisher_cotangents(), add), x, y)
        diagonal = torch.cat(
            [
                parts.get(index, parameter.new_zeros(parameter.numel()))
                for index, parameter in enumerate(self.params)
            ]
        )
        return self._loss(f, y), self._subnetwork(diagonal)

    def jacobians(self, x: X, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Jacobians [N, C, P] and outputs [N, C]; C backward passes.

        With `enable_backprop` laplace-torch's own, differentiable and slower, serves.
        """
        if enable_backprop:
            differentiable: tuple[Tensor, Tensor] = super().jacobians(x, enable_backprop)
            return differentiable
        return self._jacobian_rows(x, lambda step: step.functions.plain(step.u))

    def selected_output_jacobians(
        self, x: X, outputs: Tensor, enable_backprop: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Jacobians [N, S, P] of the outputs [N] or [N, S] of each example, and all outputs; S backward passes."""
        if enable_backprop:
            differentiable: tuple[Tensor, Tensor] = super().selected_output_jacobians(
                x, outputs, enable_backprop
            )
            return differentiable
        chosen = outputs.reshape(len(outputs), -1)
        return self._jacobian_rows(
            x, lambda step: nn.functional.one_hot(chosen, step.u.shape[1]).mT.to(step.u)
        )

    def gradients(self, x: X, y: Tensor) -> tuple[Tensor, Tensor]:
        """Per-example gradients [N, P] of `lossfunc`, and the sum of the losses; one backward pass."""
        rows, f = self._jacobian_rows(x, self._cotangents_of("empirical"), y)
        return rows[:, 0] / self.factor, self.lossfunc(f, y).detach()

    def _jacobian_rows(
        self, x: X, cotangents: Callable[[Step], Tensor], y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[N, K, P] and outputs [N, C]."""
        rows: list[list[Tensor]] = []

        def keep(parameter: int, k: int, jacobian: Tensor) -> None:
            rows.extend([] for _ in range(k + 1 - len(rows)))
            if not rows[k]:
                rows[k] = [jacobian.new_zeros(len(jacobian), p.numel()) for p in self.params]
            rows[k][parameter] = jacobian

        f = self._pass(ParameterJacobians(self._places, cotangents, keep), x, y)
        return self._subnetwork(torch.stack([torch.cat(parts, 1) for parts in rows], 1)), f

    def _pass(self, listener: Listener, x: X, y: Tensor | None = None) -> Tensor:
        """One forward pass and the listener's backward passes. Returns outputs [N, C].

        Raises:
            InvalidBatchError: outputs are not finite, or do not fit the likelihood or the targets y.
            UnsupportedAdapterError: a parameter is used where no layer's forward pass shows it; names it.
        """
        steps: list[BatchStep] = []
        likelihood = Gaussian() if y is None else self._likelihood
        checked = self._all_uses_seen
        run(
            Subject(self.model, self._head, self._layers, likelihood),
            [{"x": x, "y": y}],
            listener if checked else UsesSeen(listener, self._layers, self._places, self.params),
            steps.append,
            generator=self._generator,
            parameters=() if checked else self.params,
            plain_outputs=y is None,
        )
        self._all_uses_seen |= len(steps[0].u) > 1  # one example says nothing about rows
        return steps[0].u

    def _fisher_cotangents(self, samples: int | None = None) -> Callable[[Step], Tensor]:
        fisher = self.fisher
        if isinstance(fisher, MonteCarlo) and samples is not None:
            fisher = MonteCarlo(samples)
        return self._cotangents_of(fisher)

    @staticmethod
    def _cotangents_of(fisher: Fisher) -> Callable[[Step], Tensor]:
        return lambda step: step.functions.spread(step.fisher(fisher))

    def _loss(self, f: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.factor * self.lossfunc(f, y).detach()
        return loss

    def _subnetwork(self, values: Tensor) -> Tensor:
        return values if self.subnetwork_indices is None else values[..., self.subnetwork_indices]


class FastGGN(_FastInterface, GGNInterface):
    """Generalised Gauss-Newton (exact Fisher); C - 1 backward passes a batch for classification.

    Args:
        model: model(batch) gives logits [N, C].
        likelihood: "classification" or "regression".
        last_layer: as laplace-torch sets it.
        subnetwork_indices: as laplace-torch sets it.
        dict_key_x: unused: sizes are read off the batch.
        dict_key_y: as laplace-torch sets it.
        stochastic: labels sampled from the model instead, one backward pass a sample.
        num_samples: labels per example for `stochastic`.
        kfac_approx: "expand" (curvlinops' default) or "reduce".
        seed: of the sampled labels.

    Raises:
        UnsupportedAdapterError: a parameter that requires grad is not part of a linear layer; names it.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        stochastic: bool = False,
        num_samples: int = 1,
        kfac_approx: str = "expand",
        seed: int = 0,
    ) -> None:
        super().__init__(
            model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, stochastic, num_samples
        )
        self._prepare(kfac_approx, num_samples, seed)

    @property
    def fisher(self) -> Fisher:
        return MonteCarlo(self.mc_samples) if self.stochastic else "exact"


class FastEF(_FastInterface, EFInterface):
    """Empirical Fisher: the given labels, one backward pass a batch.

    Args:
        model: as for `FastGGN`.
        likelihood: as for `FastGGN`.
        last_layer: as laplace-torch sets it.
        subnetwork_indices: as laplace-torch sets it.
        dict_key_x: unused: sizes are read off the batch.
        dict_key_y: as laplace-torch sets it.
        kfac_approx: "expand" or "reduce".

    Raises:
        UnsupportedAdapterError: as for `FastGGN`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        kfac_approx: str = "expand",
    ) -> None:
        super().__init__(model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y)
        self._prepare(kfac_approx, 1, 0)

    @property
    def fisher(self) -> Fisher:
        return "empirical"


class _KronListener(Listener):
    """Listener that sums the dense Kronecker factors of one batch, one input factor per distinct input.

    Args:
        layers: the tapped layers.
        tokens: expand or reduce.
        cotangents: [N, C, K] of a step.
    """

    def __init__(
        self, layers: list[LinearLayer], tokens: TokenSharing, cotangents: Callable[[Step], Tensor]
    ) -> None:
        if tokens not in (TokenSharing.EXPAND, TokenSharing.REDUCE):
            raise ValueError(f"kfac_approx must be 'expand' or 'reduce', got {tokens.value!r}")
        self._layers, self._tokens, self._cotangents = layers, tokens, cotangents
        self._inputs: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}
        self._scaled: dict[int, Tensor] = {}  # inputs' factors over the number of examples
        self._finished: dict[int, list[Tensor]] = {}
        self._shared_inputs: list[int] = []

    def start(self, step: Step) -> Tensor:
        self._shared_inputs = step.shared_inputs
        return self._cotangents(step)

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> None:
        if self._tokens is TokenSharing.REDUCE:
            lengths = x.shape[1] if mask is None else mask.sum(1, keepdim=True)
            self._add(self._inputs, group, selected(x, mask).sum(1) / lengths)
        elif mask is None:
            self._add(self._inputs, group, x.flatten(0, 1), alpha=1 / x.shape[1])
        else:
            lengths = mask.sum(1)[:, None, None].to(lk.accumulation_dtype(x.dtype))
            self._add(self._inputs, group, x / lengths.sqrt(), mask)

    def observe_gradient(self, layer: int, g: Tensor, mask: Tensor | None) -> None:
        if self._tokens is TokenSharing.REDUCE:
            self._add(self._gradients, layer, selected(g, mask).sum(1))
        else:
            self._add(self._gradients, layer, g, mask)

    def factors(self, layer: int, bias: bool, n_examples: int) -> list[Tensor]:
        """[gradient, input] of a layer's weight, or [gradient] of its bias; the same tensors for what is shared."""
        if layer not in self._finished:
            self._finished[layer] = self._finish(layer, n_examples)
        return self._finished[layer][:1] if bias else self._finished[layer]

    def _finish(self, layer: int, n_examples: int) -> list[Tensor]:
        module, group = self._layers[layer].module, self._shared_inputs[layer]
        x, g = self._inputs.get(group), self._gradients.get(layer)
        if group not in self._scaled:
            x = (
                module.weight.new_zeros(module.in_features, module.in_features)
                if x is None
                else lk.mirror_(x)
            )
            self._scaled[group] = x / n_examples
        g = (
            self._scaled[group].new_zeros(module.out_features, module.out_features)
            if g is None
            else lk.mirror_(g)
        )
        return [g, self._scaled[group]]

    @staticmethod
    def _add(
        sums: dict[int, Tensor], key: int, x: Tensor, mask: Tensor | None = None, alpha: float = 1.0
    ) -> None:
        d = x.shape[-1]
        if key not in sums:
            sums[key] = torch.zeros(d, d, dtype=lk.accumulation_dtype(x.dtype), device=x.device)
        lk.gram_(sums[key], x.reshape(-1, d), None if mask is None else mask.flatten(), alpha)
