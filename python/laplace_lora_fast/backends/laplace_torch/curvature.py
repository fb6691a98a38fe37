"""`FastGGN` and `FastEF`: one forward pass and as few backward passes as the Fisher allows, for linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from laplace.curvature import CurvatureInterface, EFInterface, GGNInterface
from laplace.utils import Kron
from torch import Tensor, nn

import laplace_kernels as lk
from laplace_lora_fast.backends.linear import (
    BatchHead,
    JacobianObserver,
    LinearSite,
    likelihood_of,
    locate,
    require_all_uses_seen,
    selected,
)
from laplace_lora_fast.devices import device_of
from laplace_lora_fast.errors import DeferredChecks
from laplace_lora_fast.kfac import Kfac
from laplace_lora_fast.likelihoods import Fisher, fisher_cotangents
from laplace_lora_fast.streams import Observer
from laplace_lora_fast.taps import Tap

X: TypeAlias = Tensor | Mapping[str, Any]


class _FastInterface(CurvatureInterface):
    """What `FastGGN` and `FastEF` share: one forward pass and as many backward passes as the Fisher has cotangents."""

    def _prepare(self, kfac_approx: str, mc_samples: int, seed: int) -> None:
        self.kfac_approx = Kfac(kfac_approx)
        self.mc_samples = mc_samples
        self._generator = torch.Generator().manual_seed(seed)
        self._sites, self._places = locate(self.model, self.params)
        self._n_params = sum(parameter.numel() for parameter in self.params)
        self._likelihood = likelihood_of(self.likelihood)
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
        mode = self.kfac_approx if kfac_approx is None else Kfac(kfac_approx)
        observer = _KronObserver(self._sites, mode)

        def run(tap: Tap, logits: Tensor, cotangents: Tensor) -> None:
            assert tap.groups is not None
            for k in range(cotangents.shape[2]):
                tap.backward(logits, cotangents[:, :, k], last=k == cotangents.shape[2] - 1)
            observer.groups = tap.groups

        f = self._pass(observer, run, x, lambda f: self._cotangents(f, y, mc_samples), y)
        factors = [observer.factors(place.site, place.bias, N) for place in self._places]
        return self._loss(f, y), Kron(factors)

    def full(self, x: X, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Sum of the losses, and the curvature [P, P] of one batch."""
        rows, f = self._jacobian_rows(x, lambda f: self._cotangents(f, y), y)
        rows = rows.flatten(0, 1)
        return self._loss(f, y), rows.mT @ rows

    def diag(self, x: X, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Sum of the losses, and the curvature's diagonal [P] of one batch. No Jacobian of the whole model is held."""
        parts: dict[int, Tensor] = {}

        def add(parameter: int, k: int, jacobian: Tensor) -> None:
            parts[parameter] = parts.get(parameter, 0) + jacobian.square().sum(0)

        observer = JacobianObserver(self._places, add)
        f = self._pass(observer, observer.run, x, lambda f: self._cotangents(f, y), y)
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
        return self._jacobian_rows(x, lambda f: torch.eye(f.shape[1]).expand(len(f), -1, -1))

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
        return self._jacobian_rows(x, lambda f: nn.functional.one_hot(chosen, f.shape[1]).mT)

    def gradients(self, x: X, y: Tensor) -> tuple[Tensor, Tensor]:
        """Per-example gradients [N, P] of `lossfunc`, and the sum of the losses; one backward pass."""
        rows, f = self._jacobian_rows(x, lambda f: self._residual(f, y)[..., None], y)
        return rows[:, 0] / self.factor, self.lossfunc(f, y).detach()

    def _jacobian_rows(
        self, x: X, cotangents: Callable[[Tensor], Tensor], y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[N, K, P] and outputs [N, C]."""
        rows: list[list[Tensor]] = []

        def keep(parameter: int, k: int, jacobian: Tensor) -> None:
            rows.extend([] for _ in range(k + 1 - len(rows)))
            if not rows[k]:
                rows[k] = [jacobian.new_zeros(len(jacobian), p.numel()) for p in self.params]
            rows[k][parameter] = jacobian

        observer = JacobianObserver(self._places, keep)
        f = self._pass(observer, observer.run, x, cotangents, y)
        return self._subnetwork(torch.stack([torch.cat(parts, 1) for parts in rows], 1)), f

    def _pass(
        self,
        observer: Observer,
        run: Callable[[Tap, Tensor, Tensor], None],
        x: X,
        cotangents: Callable[[Tensor], Tensor],
        y: Tensor | None = None,
    ) -> Tensor:
        """One forward pass and `run` with cotangents [N, C, K] of the outputs. Returns outputs [N, C].

        Raises:
            InvalidBatchError: outputs are not finite, or do not fit the likelihood or the targets y.
            UnsupportedAdapterError: a parameter is used where no layer's forward pass shows it; names it.
        """
        head, checks = BatchHead(self.model), DeferredChecks()
        inputs = head.inputs({"x": x, "y": None}, device_of(self.model), checks)
        if not self._all_uses_seen:
            require_all_uses_seen(self.model, head, inputs, self._sites, self._places, self.params)
        with Tap(self.model, head, self._sites, observer) as tap:
            logits = tap.forward(inputs)
            f = logits.detach()
            checks.require(f.isfinite().all(), "a batch gives outputs that are not finite")
            if y is not None:
                self._likelihood.check(f)
                self._likelihood.targets(y, f, checks)
            run(tap, logits, cotangents(f.to(lk.accumulation_dtype(f.dtype))).to(f))
        checks.settle()
        self._all_uses_seen |= inputs.batch_size > 1  # one example says nothing about rows
        return f

    def _cotangents(self, f: Tensor, y: Tensor, mc_samples: int | None = None) -> Tensor:
        targets = self._targets(f, y) if self.fisher is Fisher.EMPIRICAL else None
        samples = self.mc_samples if mc_samples is None else mc_samples
        return fisher_cotangents(self._likelihood, self.fisher, f, targets, self._generator, samples)

    def _residual(self, f: Tensor, y: Tensor) -> Tensor:
        return self._likelihood.residual(f, self._targets(f, y))

    def _targets(self, f: Tensor, y: Tensor) -> Tensor:
        checks = DeferredChecks()
        targets = self._likelihood.targets(y, f, checks)
        checks.settle()
        assert targets is not None
        return targets

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
        return Fisher.MC if self.stochastic else Fisher.EXACT


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
        return Fisher.EMPIRICAL


class _KronObserver:
    """Observer that sums the dense Kronecker factors of one batch, one input factor per distinct input.

    Args:
        sites: the tapped layers.
        mode: expand or reduce.
    """

    def __init__(self, sites: list[LinearSite], mode: Kfac) -> None:
        if mode not in (Kfac.EXPAND, Kfac.REDUCE):
            raise ValueError(f"kfac_approx must be 'expand' or 'reduce', got {mode.value!r}")
        self._sites, self._mode = sites, mode
        self._inputs: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}
        self.groups: list[int] = []

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> None:
        if self._mode is Kfac.REDUCE:
            lengths = x.shape[1] if mask is None else mask.sum(1, keepdim=True)
            self._add(self._inputs, group, selected(x, mask).sum(1) / lengths)
        elif mask is None:
            self._add(self._inputs, group, x.flatten(0, 1), alpha=1 / x.shape[1])
        else:
            lengths = mask.sum(1)[:, None, None].to(lk.accumulation_dtype(x.dtype))
            self._add(self._inputs, group, x / lengths.sqrt(), mask)

    def observe_gradient(self, site: int, g: Tensor, mask: Tensor | None) -> None:
        if self._mode is Kfac.REDUCE:
            self._add(self._gradients, site, selected(g, mask).sum(1))
        else:
            self._add(self._gradients, site, g, mask)

    def factors(self, site: int, bias: bool, n_examples: int) -> list[Tensor]:
        """[gradient, input] of a layer's weight, or [gradient] of its bias."""
        layer = self._sites[site].module
        x, g = self._inputs.get(self.groups[site]), self._gradients.get(site)
        x = layer.weight.new_zeros(layer.in_features, layer.in_features) if x is None else lk.mirror_(x)
        g = x.new_zeros(layer.out_features, layer.out_features) if g is None else lk.mirror_(g)
        return [g] if bias else [g, x / n_examples]

    @staticmethod
    def _add(
        sums: dict[int, Tensor], key: int, x: Tensor, mask: Tensor | None = None, alpha: float = 1.0
    ) -> None:
        d = x.shape[-1]
        if key not in sums:
            sums[key] = torch.zeros(d, d, dtype=lk.accumulation_dtype(x.dtype), device=x.device)
        lk.gram_(sums[key], x.reshape(-1, d), None if mask is None else mask.flatten(), alpha)
