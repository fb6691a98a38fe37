"""Kronecker factors of linear layers, full or low-rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kernels as lk
from laplace_lora_fast.backends.linear import LinearSite, named_fields
from laplace_lora_fast.devices import device_of
from laplace_lora_fast.errors import (
    DeferredChecks,
    InvalidBatchError,
    NumericalError,
    UnsupportedAdapterError,
)
from laplace_lora_fast.factors import DenseFactor, Factor, SketchFactor, flush_full
from laplace_lora_fast.heads import Head, Inputs
from laplace_lora_fast.kfac import Kfac, add_gradient, add_input
from laplace_lora_fast.likelihoods import Categorical, Fisher, fisher_cotangents
from laplace_lora_fast.progress import track
from laplace_lora_fast.streams import Observer
from laplace_lora_fast.taps import Tap

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
    sites = [
        LinearSite(name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(keyword in name for keyword in keywords)
    ]
    if not sites:
        raise ValueError(f"no nn.Linear has a name with one of {keywords}")
    if fisher not in ("auto", "exact", "mc"):
        raise ValueError(
            f"fisher must be 'auto', 'exact' or 'mc' (forward_call gives no labels), got {fisher!r}"
        )
    biased = [site.module.bias is not None and not exclude_bias for site in sites]
    sums: _LastTokenFactors | _AllTokenFactors
    if compat:
        sums = _LastTokenFactors(biased, n_kfac, lr_threshold)
    else:
        sums = _AllTokenFactors(biased, n_kfac, lr_threshold, Kfac(kfac), seed)
    generator = torch.Generator().manual_seed(seed)
    n_batches = 0
    with _CallTap(model, forward_call, sites, sums) as tap:
        for batch in track(loader, "factors", use_tqdm):
            logits = tap.call(batch)
            outputs = logits.detach().to(lk.accumulation_dtype(logits.dtype))
            if compat:
                cotangents = _sampled_mean_loss(outputs)
            else:
                few = outputs.shape[1] <= _FEW_LOGITS
                which = Fisher(fisher) if fisher != "auto" else Fisher.EXACT if few else Fisher.MC
                cotangents = fisher_cotangents(Categorical(), which, outputs, None, generator)
            for k in range(cotangents.shape[2]):
                tap.backward(logits, cotangents[:, :, k], last=k == cotangents.shape[2] - 1)
                sums.finish_pass()
            n_batches += 1
    if tap.groups is None:
        raise InvalidBatchError("loader yielded no batch")
    return {
        site.name: sums.factors(index, tap.groups[index], site, n_batches)
        for index, site in enumerate(sites)
        if sums.saw(tap.groups[index])
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
    """Logits by a call of the user's own."""

    def __init__(self, model: nn.Module, forward_call: ForwardCall) -> None:
        super().__init__(model)
        self._forward_call = forward_call

    def logits(self, model: nn.Module, inputs: Inputs) -> Tensor:
        logits = self._forward_call(model, inputs.model["batch"])
        if logits.dim() != 2:
            raise InvalidBatchError(f"forward_call must return logits [N, C], got {tuple(logits.shape)}")
        return logits


class _CallTap(Tap):
    """A tap that reads batch size and mask off what the user's call gives to the model."""

    def __init__(
        self, model: nn.Module, forward_call: ForwardCall, sites: list[LinearSite], observer: Observer
    ) -> None:
        super().__init__(model, _CallHead(model, forward_call), sites, observer)

    def __enter__(self) -> _CallTap:
        super().__enter__()
        handle = self.model.register_forward_pre_hook(self._read_inputs, with_kwargs=True)
        self._stack.callback(handle.remove)
        return self

    def call(self, batch: Any) -> Tensor:
        """Logits of a batch, with their graph."""
        return self.forward(Inputs({"batch": batch}, None, 0, None, None, None))

    def _read_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        fields = {**(named_fields(args[0]) if args else {}), **kwargs}
        self._inputs = self.head.inputs(fields, device_of(self.model), DeferredChecks())


class _AllTokenFactors:
    """Observer that sums the factors of every layer, one input factor per distinct input."""

    def __init__(
        self, biased: list[bool], n_kfac: int | None, lr_threshold: int, mode: Kfac, seed: int
    ) -> None:
        self._biased, self._n_kfac, self._lr_threshold = biased, n_kfac, lr_threshold
        self._mode, self._seed = mode, seed
        self._inputs: dict[int, Factor] = {}
        self._gradients: dict[int, Factor] = {}
        self._rows: dict[int, Tensor | int] = {}

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> None:
        if self._biased[group]:
            x = _with_one(x)
        factor = self._factor(self._inputs, group, x, 2 * group)
        self._rows[group] = self._rows.get(group, 0) + add_input(factor, self._mode, x, mask)

    def observe_gradient(self, site: int, g: Tensor, mask: Tensor | None) -> None:
        add_gradient(self._factor(self._gradients, site, g, 2 * site + 1), self._mode, g, mask)

    def finish_pass(self) -> None:
        """After each backward pass."""
        flush_full([*self._inputs.values(), *self._gradients.values()])

    def saw(self, group: int) -> bool:
        """Whether any input came."""
        return group in self._inputs

    def factors(self, index: int, group: int, site: LinearSite, n_batches: int) -> tuple[Tensor, Tensor]:
        """(A, S) of a layer."""
        _refuse_mixed(self._biased, index, group, site)
        x, g = self._inputs[group], self._gradients.get(index)
        if g is None:
            g = self._new(site.module.out_features, x.dtype, x.device, 0)
        if not (x.is_finite() and g.is_finite()):
            raise NumericalError(f"the factors of layer {site.name!r} are not finite: a batch holds NaN")
        rows = float(self._rows[group])
        return self._result(x, rows), self._result(g, 1.0)

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

    def _is_low_rank(self, dim: int) -> bool:
        return self._n_kfac is not None and dim >= self._lr_threshold


class _LastTokenFactors:
    """Observer that does as bayesian-lora does: the last token, and a truncated SVD every batch for large factors."""

    def __init__(self, biased: list[bool], n_kfac: int | None, lr_threshold: int) -> None:
        self._biased, self._n_kfac, self._lr_threshold = biased, n_kfac, lr_threshold
        self._inputs: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> None:
        self._add(self._inputs, group, _with_one(x[:, -1]) if self._biased[group] else x[:, -1])

    def observe_gradient(self, site: int, g: Tensor, mask: Tensor | None) -> None:
        self._add(self._gradients, site, g[:, -1])

    def finish_pass(self) -> None:
        """Nothing waits."""

    def saw(self, group: int) -> bool:
        """Whether any input came."""
        return group in self._inputs

    def factors(self, index: int, group: int, site: LinearSite, n_batches: int) -> tuple[Tensor, Tensor]:
        """(A, S) of a layer."""
        _refuse_mixed(self._biased, index, group, site)
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

    def _is_low_rank(self, dim: int) -> bool:
        return self._n_kfac is not None and dim >= self._lr_threshold


def _refuse_mixed(biased: list[bool], index: int, group: int, site: LinearSite) -> None:
    if biased[index] != biased[group]:
        raise UnsupportedAdapterError(
            f"layer {site.name!r} shares its input with another, and only one has a bias: pass exclude_bias=True"
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
