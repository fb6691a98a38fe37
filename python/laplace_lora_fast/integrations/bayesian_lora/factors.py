"""Kronecker factors of linear layers, full or low-rank."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kernels as lk
from laplace_lora_fast.devices import device_of
from laplace_lora_fast.errors import (
    DeferredChecks,
    InvalidBatchError,
    NumericalError,
    UnsupportedAdapterError,
)
from laplace_lora_fast.fitting.passes import Subject, run
from laplace_lora_fast.likelihoods import Categorical, Fisher, MonteCarlo
from laplace_lora_fast.model.batches import Inputs
from laplace_lora_fast.model.heads import Head
from laplace_lora_fast.model.linear import LinearLayer, named_fields
from laplace_lora_fast.progress import track
from laplace_lora_fast.structures.base import Listener, Step
from laplace_lora_fast.structures.blocks.factors import DenseFactor, Factor, SketchFactor, flush_full
from laplace_lora_fast.structures.blocks.kfac import TokenSharing, add_gradient, add_input

Factors = dict[str, tuple[Tensor, Tensor]]
ForwardCall = Callable[[nn.Module, Any], Tensor]

_FEW_LOGITS = 32  # beyond, fisher="auto" samples labels


def calculate_kronecker_factors(
    model: nn.Module,
    forward_call: ForwardCall,
    loader: Iterable[Any],
    n_kfac: int | None = None,
    lr_threshold: int = 512,
    target_module_keywords: Iterable[str] = ("",),
    exclude_bias: bool = False,
    use_tqdm: bool = False,
    *,
    compat: bool = False,
    kfac: str = "reduce",
    fisher: str = "auto",
    seed: int = 0,
) -> Factors:
    """Kronecker factors of the linear layers whose name contains a keyword.

    Args:
        model: any model; `forward_call` calls it once a batch.
        forward_call: (model, batch) -> logits [N, C].
        loader: batches, as `forward_call` takes them.
        n_kfac: columns of low-rank factors; None keeps all factors full.
        lr_threshold: factors of this size or larger are low-rank.
        target_module_keywords: [""] takes every nn.Linear, ["lora"] a LoRA adapter.
        exclude_bias: leave biases out. Otherwise the input of a layer with a bias has a last component 1.
        use_tqdm: show a bar.
        compat: bayesian-lora's numbers, drawing labels from torch's global generator as it does. `kfac`, `fisher` and
            `seed` then have no effect.
        kfac: "reduce" or "expand", how tokens share a weight.
        fisher: "exact" (C - 1 backward passes a batch), "mc" (one sampled label, as in bayesian-lora), or "auto": exact
            for at most 32 logits.
        seed: of sampled labels and sketches.

    Returns:
        {name: (A, S)}, each factor full [d, d] or a low-rank root [d, n_kfac] (A is about root root^T).

    Raises:
        ValueError: a choice is unknown, or no layer matches.
        InvalidBatchError: the loader is empty, or a batch is unusable.
        NumericalError: a factor is not finite; names the layer.
    """
    keywords = list(target_module_keywords)
    layers = [
        LinearLayer(name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(keyword in name for keyword in keywords)
    ]
    if not layers:
        raise ValueError(f"no nn.Linear has a name with one of {keywords}")
    if fisher not in ("auto", "exact", "mc"):
        raise ValueError(
            f"fisher must be 'auto', 'exact' or 'mc' (forward_call gives no labels), got {fisher!r}"
        )
    biased = [layer.module.bias is not None and not exclude_bias for layer in layers]
    sums: LayerSums
    if compat:
        sums = _LastTokenSums(biased, n_kfac, lr_threshold)
    else:
        sums = _AllTokenSums(biased, n_kfac, lr_threshold, TokenSharing(kfac), fisher, seed)
    n_batches = 0

    def count(_: object) -> None:
        nonlocal n_batches
        n_batches += 1

    tap = run(
        Subject(model, _CallHead(model, forward_call), layers, Categorical()),
        track(({"batch": batch} for batch in loader), "factors", use_tqdm),
        sums,
        count,
        generator=torch.Generator().manual_seed(seed),
    )
    assert tap.shared_inputs is not None
    return {
        layer.name: sums.factors(index, tap.shared_inputs[index], layer, n_batches)
        for index, layer in enumerate(layers)
        if sums.saw(tap.shared_inputs[index])
    }


def stable_cholesky(
    K: Tensor, mult_eps: float = 1e-8, abs_eps: float = 1e-8, max_tries: int = 1000
) -> Tensor:
    """Cholesky factor of K [d, d] with its diagonal multiplied by 1 + mult_eps and raised by abs_eps.

    Both grow by a tenth until the factorisation succeeds, `max_tries` times.

    Raises:
        ValueError: K is not square, or never positive definite.
    """
    if K.shape[-1] != K.shape[-2]:
        raise ValueError(f"K must be square, got {tuple(K.shape)}")
    for attempt in range(max_tries):
        growth = 1.1**attempt
        shifted = K.clone()
        diagonal = shifted.diagonal(dim1=-2, dim2=-1)
        diagonal.mul_(1 + mult_eps * growth).add_(abs_eps * growth)
        root, info = torch.linalg.cholesky_ex(shifted)
        if not info.any():
            lower: Tensor = root
            return lower
    raise ValueError(f"K has no Cholesky factor after {max_tries} shifts of its diagonal")


def incremental_svd(
    A: Tensor, a: Tensor, dtype: torch.dtype = torch.float64, n_kfac: int | None = None
) -> Tensor:
    """The best rank-k root of A A^T + a^T a.

    Args:
        A: root [d, r] so far.
        a: new rows [n, d].
        dtype: of the computation.
        n_kfac: k; None for r.

    Returns:
        [d, k].
    """
    U, S, _ = torch.linalg.svd(torch.cat([A.to(dtype), a.to(dtype).mT], 1), full_matrices=False)
    k = A.shape[1] if n_kfac is None else n_kfac
    root: Tensor = U[:, :k] * S[:k]
    return root


def cholesky_decompose_small_factors(
    factors: Factors,
    lr_threshold: int,
    device: str | torch.device,
    dtype: torch.dtype,
    *,
    compat: bool = False,
) -> Factors:
    """Replaces every full factor smaller than `lr_threshold` by its lower triangular root L, L L^T the factor.

    Call it between `calculate_kronecker_factors` and the functions that take `factors`. Changes `factors` in place.

    Args:
        factors: {name: (A, S)}.
        lr_threshold: as for `calculate_kronecker_factors`.
        device: where the results go.
        dtype: of the results.
        compat: roots by `stable_cholesky`.

    Returns:
        `factors`.
    """

    def rooted(factor: Tensor) -> Tensor:
        if factor.shape[0] < lr_threshold:
            factor = stable_cholesky(factor.double()) if compat else _lower_root(factor.double())
        return factor.to(device, dtype)

    for name, (A, S) in factors.items():
        factors[name] = rooted(A), rooted(S)
    return factors


class _CallHead(Head):
    """Logits by a call of the user's own; batch size and mask are read off what that call gives to the model."""

    def __init__(self, model: nn.Module, forward_call: ForwardCall) -> None:
        super().__init__(model)
        self._model, self._forward_call = model, forward_call
        self._seen: Inputs | None = None

    def inputs(self, batch: Mapping[str, Any], device: torch.device, checks: DeferredChecks) -> Inputs:
        return Inputs(dict(batch), None, 0, None, None, None)

    @contextmanager
    def installed(self) -> Iterator[None]:
        handle = self._model.register_forward_pre_hook(self._read_inputs, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._seen = None

    def as_called(self, inputs: Inputs) -> Inputs:
        return inputs if self._seen is None else self._seen

    def u(self, model: nn.Module, inputs: Inputs) -> Tensor:
        logits = self._forward_call(model, inputs.model["batch"])
        if logits.dim() != 2:
            raise InvalidBatchError(f"forward_call must return logits [N, C], got {tuple(logits.shape)}")
        return logits

    def _read_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        fields = {**(named_fields(args[0]) if args else {}), **kwargs}
        self._seen = super().inputs(fields, device_of(module), DeferredChecks())


class LayerSums(Listener):
    """Listener that sums something of every layer's inputs and output gradients.

    Args:
        biased: for each layer whether its bias counts, as the weight of an input of 1.
        n_kfac: columns of low-rank factors; None for full ones.
        lr_threshold: the smallest low-rank factor.
    """

    def __init__(self, biased: list[bool], n_kfac: int | None, lr_threshold: int) -> None:
        self._biased, self._n_kfac, self._lr_threshold = biased, n_kfac, lr_threshold

    @abstractmethod
    def saw(self, group: int) -> bool:
        """Whether any input came."""

    @abstractmethod
    def factors(self, index: int, group: int, layer: LinearLayer, n_batches: int) -> tuple[Tensor, Tensor]:
        """(A, S) of a layer."""

    def _is_low_rank(self, dim: int) -> bool:
        return self._n_kfac is not None and dim >= self._lr_threshold


class _AllTokenSums(LayerSums):
    """The factors of every layer, one input factor per distinct input."""

    def __init__(
        self,
        biased: list[bool],
        n_kfac: int | None,
        lr_threshold: int,
        tokens: TokenSharing,
        fisher: str,
        seed: int,
    ) -> None:
        super().__init__(biased, n_kfac, lr_threshold)
        self._tokens, self._fisher, self._seed = tokens, fisher, seed
        self._inputs: dict[int, Factor] = {}
        self._gradients: dict[int, Factor] = {}
        self._divisors: dict[int, Tensor | int] = {}

    def start(self, step: Step) -> Tensor:
        exact = self._fisher == "exact" or (self._fisher == "auto" and step.u.shape[1] <= _FEW_LOGITS)
        fisher: Fisher = "exact" if exact else MonteCarlo()
        return step.functions.spread(step.fisher(fisher))

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> None:
        if self._biased[group]:
            x = _with_one(x)
        factor = self._factor(self._inputs, group, x, 2 * group)
        self._divisors[group] = self._divisors.get(group, 0) + add_input(factor, self._tokens, x, mask)

    def observe_gradient(self, layer: int, g: Tensor, mask: Tensor | None) -> None:
        add_gradient(self._factor(self._gradients, layer, g, 2 * layer + 1), self._tokens, g, mask)

    def finish_pass(self) -> None:
        flush_full([*self._inputs.values(), *self._gradients.values()])

    def saw(self, group: int) -> bool:
        return group in self._inputs

    def factors(self, index: int, group: int, layer: LinearLayer, n_batches: int) -> tuple[Tensor, Tensor]:
        _refuse_mixed(self._biased, index, group, layer)
        x, g = self._inputs[group], self._gradients.get(index)
        if g is None:
            g = self._new(layer.module.out_features, x.dtype, x.device, 0)
        if not (x.is_finite() and g.is_finite()):
            raise NumericalError(f"the factors of layer {layer.name!r} are not finite: a batch holds NaN")
        return self._result(x, float(self._divisors[group])), self._result(g, 1.0)

    def _result(self, factor: Factor, divisor: float) -> Tensor:
        if not self._is_low_rank(factor.dim):
            return factor.quadratic(torch.eye(factor.dim, device=factor.device)).to(factor.dtype) / divisor
        assert self._n_kfac is not None
        spectrum = factor.spectrum(self._n_kfac)
        root = spectrum.vectors.double() * (spectrum.values / divisor).sqrt()
        return nn.functional.pad(root, (0, self._n_kfac - root.shape[1]))

    def _factor(self, factors: dict[int, Factor], key: int, x: Tensor, stream: int) -> Factor:
        if key not in factors:
            factors[key] = self._new(x.shape[-1], lk.accumulation_dtype(x.dtype), x.device, stream)
        return factors[key]

    def _new(self, dim: int, dtype: torch.dtype, device: torch.device, stream: int) -> Factor:
        if not self._is_low_rank(dim):
            return DenseFactor(dim, dtype, device)
        assert self._n_kfac is not None
        nothing = torch.zeros(dim, 0, dtype=dtype, device=device)
        return SketchFactor(max(128, 4 * self._n_kfac), nothing, dtype, self._seed + stream)


class _LastTokenSums(LayerSums):
    """As bayesian-lora does: the last token, and a truncated SVD every batch for large factors."""

    def __init__(self, biased: list[bool], n_kfac: int | None, lr_threshold: int) -> None:
        super().__init__(biased, n_kfac, lr_threshold)
        self._inputs: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}

    def start(self, step: Step) -> Tensor:
        return _sampled_mean_loss(step.u)

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> None:
        self._add(self._inputs, group, _with_one(x[:, -1]) if self._biased[group] else x[:, -1])

    def observe_gradient(self, layer: int, g: Tensor, mask: Tensor | None) -> None:
        self._add(self._gradients, layer, g[:, -1])

    def saw(self, group: int) -> bool:
        return group in self._inputs

    def factors(self, index: int, group: int, layer: LinearLayer, n_batches: int) -> tuple[Tensor, Tensor]:
        _refuse_mixed(self._biased, index, group, layer)
        A, S = self._inputs[group], self._gradients[index]
        return (
            A if self._is_low_rank(len(A)) else A / n_batches,
            S if self._is_low_rank(len(S)) else S / n_batches,
        )

    def _add(self, sums: dict[int, Tensor], key: int, rows: Tensor) -> None:
        rows = rows.to(lk.accumulation_dtype(rows.dtype))
        if self._is_low_rank(rows.shape[1]):
            empty = rows.new_zeros(rows.shape[1], self._n_kfac or 0, dtype=torch.float64)
            sums[key] = incremental_svd(sums.get(key, empty), rows, n_kfac=self._n_kfac)
        else:
            sums[key] = sums.get(key, 0) + rows.mT @ rows


def _refuse_mixed(biased: list[bool], index: int, group: int, layer: LinearLayer) -> None:
    if biased[index] != biased[group]:
        raise UnsupportedAdapterError(
            f"layer {layer.name!r} shares its input with another, and only one has a bias: pass exclude_bias=True"
        )


def _with_one(x: Tensor) -> Tensor:
    """Appends a component 1, the input of a bias."""
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def _sampled_mean_loss(outputs: Tensor) -> Tensor:
    """Cotangent [N, C, 1] of the mean cross-entropy of labels drawn from torch's global generator."""
    probabilities = outputs.softmax(-1)
    labels = torch.multinomial(probabilities, 1)
    return (
        probabilities.scatter_add(1, labels, -torch.ones_like(labels, dtype=outputs.dtype)) / len(outputs)
    )[:, :, None]


def _lower_root(K: Tensor) -> Tensor:
    """Lower triangular L with L L^T = K for a symmetric positive semi-definite K, singular or not."""
    values, vectors = torch.linalg.eigh(K)
    upper: Tensor = torch.linalg.qr((vectors * values.clamp_min(0).sqrt()).mT).R
    return (upper * torch.where(upper.diagonal() < 0, -1, 1)[:, None]).mT
