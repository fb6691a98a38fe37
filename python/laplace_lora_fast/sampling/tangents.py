"""Samples of LoRA weights applied to a model, in hooks: linearised by forward-mode derivatives, or as weights.

At a LoRA layer y = W0 x + s B A x a step (dA, dB) of its weights adds s (dB A x + B dA x) to the derivative of y, at a
trained head y = W [x | 1] a step dW adds dW [x | 1].
Forward mode carries that to the model's output: J delta, for all samples at once with the trained model computed once
(`torch.func.vmap` over `torch.func.jvp`). Nothing is written to the model.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import laplace_kernels as lk
from laplace_lora_fast.errors import UnsupportedAdapterError
from laplace_lora_fast.model.adapters.layer import ParametersAdapted
from laplace_lora_fast.model.contexts import Caller, eager, evaluation_mode, exclusive, without_fast_path
from laplace_lora_fast.model.gradients import leaves_of, send_back
from laplace_lora_fast.model.heads import Head
from laplace_lora_fast.model.lora import Treated
from laplace_lora_fast.model.proofs.behaviour import code_of
from laplace_lora_fast.model.storage import differentiable_kernels
from laplace_lora_fast.sampling.quantised import forward_mode_of_quantised_layers
from laplace_lora_fast.weights import RowNorm, by_layer, is_head

Function = Callable[..., Any]  # of no or more tensors, to a tensor or a structure of tensors


class StepHooks:
    """Hooks on layers that make a step of their weights, in the thread and for as long as one is set.

    Args:
        model: the model.
        layers: those under the posterior.
        head: whose hooks hold inside too; None for none.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Treated], head: Head | None = None) -> None:
        self.model, self.layers, self.head = model, layers, head
        self._steps: list[Sequence[Tensor]] | None = None
        self._how: Callable[..., Tensor] = _derivative

    @contextmanager
    def installed(self) -> Iterator[StepHooks]:
        """As `model.tap.Tap`: evaluation mode, one at a time on a model, all as before on exit."""
        with ExitStack() as stack:
            stack.enter_context(exclusive(self.model))
            self._thread = threading.get_ident()
            stack.enter_context(evaluation_mode(self.model))
            code, head = code_of(self.model), self.head
            if head is not None:
                stack.enter_context(head.installed())
            stack.enter_context(differentiable_kernels(self.model))
            stack.enter_context(forward_mode_of_quantised_layers(self.model))
            stack.enter_context(without_fast_path())
            stack.enter_context(eager())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            caller = Caller(self.model)
            stack.enter_context(caller.autocast())
            if head is not None:
                head.recall(code, partial(head.u, self.model), caller.casts)
                head.code = code
            for index, layer in enumerate(self.layers):
                layer.check()
                if isinstance(layer, ParametersAdapted):
                    stack.callback(layer.moved(partial(self._step_of_parameter, index)).remove)
                    continue
                handle = layer.module.register_forward_hook(self._hook(index), prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            yield self

    def linearised(
        self,
        deltas: Sequence[Tensor],
        function: Function,
        *inputs: Tensor,
        tangents: Sequence[Tensor] = (),
        at_a_time: int = 8,
    ) -> tuple[Any, Any]:
        """The function's value and its derivative along every sample.

        Args:
            deltas: of every weight, [n, r, d].
            function: of `inputs`, by way of the model.
            inputs: shared by all samples.
            tangents: of each input, [n, ..].
            at_a_time: samples in one pass, which computes the value once.

        Returns:
            The value, and derivatives with a leading axis n.

        Raises:
            UnsupportedAdapterError: something in the model has no forward-mode derivative.
        """
        steps = self._stored(deltas)
        flat, counts = [each for own in steps for each in own], [len(own) for own in steps]
        zeros = [torch.zeros_like(each[0]) for each in flat]

        def of(*primals: Tensor) -> Any:
            ours, theirs = primals[: len(flat)], primals[len(flat) :]
            rest = iter(ours)
            with self._set([[next(rest) for _ in range(count)] for count in counts], _derivative):
                return function(*theirs)

        def along(*directions: Tensor) -> Any:
            return torch.func.jvp(of, (*zeros, *inputs), directions)

        parts = []
        with forward_mode():
            for some in zip(*(each.split(at_a_time) for each in (*flat, *tangents)), strict=True):
                value, derivative = torch.func.vmap(along, out_dims=(None, 0))(*some)  # type: ignore[arg-type]
                parts.append(derivative)
        return value, tree_map(lambda *each: torch.cat(each), *parts)

    def by_backward(
        self, deltas: Sequence[Tensor], function: Function, cotangents: Sequence[Tensor]
    ) -> Tensor:
        """The derivative along the first sample, by a backward pass: the sum over outputs of cotangent times theirs.

        Args:
            deltas: of every weight, [n, r, d].
            function: as for `linearised`, of no inputs.
            cotangents: of each tensor that it gives.

        Returns:
            A number, fp64; NaN where the function's outputs have no graph.
        """
        steps = self._stored(deltas)
        zeros = [[torch.zeros_like(each[0]).requires_grad_() for each in own] for own in steps]
        # in the same attention as forward mode: what pads see is the same
        with torch.enable_grad(), _ForwardMode(), self._set(zeros, _derivative):
            pairs = zip(tree_leaves(function()), cotangents, strict=True)
            total = sum((value.double() * c).sum() for value, c in pairs if value.requires_grad)
            if not isinstance(total, Tensor):
                return torch.tensor(math.nan)
            leaves = [each for own in zeros for each in own]
            reentrant = leaves_of(total)[1]
            gradients = send_back(total, torch.ones_like(total), leaves, retain=False, reentrant=reentrant)
        own = zip(gradients, (each[0] for step in steps for each in step), strict=True)
        found = [(g.double() * step.double()).sum() for g, step in own if g is not None]
        return torch.stack(found).sum() if found else torch.zeros(()).double()

    def as_weights(self, deltas: Sequence[Tensor], function: Function) -> Any:
        """The function's value with every sample's weights in turn, stacked."""
        steps = self._stored(deltas)
        values = []
        for sample in range(len(deltas[0])):
            with self._set([[each[sample] for each in own] for own in steps], _difference):
                values.append(function())
        return tree_map(lambda *each: torch.stack(each), *values)

    @contextmanager
    def repeated(self, deltas: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the rows of a batch are n times those of a smaller one, sample by sample, and carry derivatives.

        For forward passes that build on each other: their outputs, and caches, are dual tensors of
        `torch.autograd.forward_ad`.
        """
        with forward_mode(), forward_ad.dual_level(), self._set(self._stored(deltas), _of_rows):
            yield

    def _stored(self, deltas: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Steps of every layer's weights, [n, ..] each, in their dtype: see `steps` of the layers."""
        pairs = zip(self.layers, by_layer(deltas, self.layers), strict=True)
        return [layer.steps(own) for layer, own in pairs]

    @contextmanager
    def _set(self, steps: Sequence[Sequence[Tensor]], how: Callable[..., Tensor]) -> Iterator[None]:
        self._steps, self._how = list(steps), how
        try:
            yield
        finally:
            self._steps = None

    def _step_of_parameter(self, index: int) -> tuple[Tensor, Tensor] | None:
        """The step of a layer whose weights are added to a parameter; None where none is set."""
        if self._steps is None or threading.get_ident() != self._thread:
            return None
        if self._how is _of_rows:
            raise UnsupportedAdapterError(
                f"layer {self.layers[index].name!r} is LoRA on a parameter, which all rows of a batch share: texts "
                "that are generated under samples need rows of their own. Score texts instead, or leave the "
                "layer out with layers=lambda name: .."
            )
        da, db = self._steps[index]
        return da, db

    def _hook(self, index: int) -> Callable[..., Any]:
        layer = self.layers[index]
        norm = layer.weights.norm

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
            if self._steps is None or threading.get_ident() != self._thread:
                return output
            x = args[0] if args else next(iter(kwargs.values()))
            with torch.autocast(x.device.type, enabled=False):
                steps = self._steps[index]
                if is_head(layer):
                    return self._how(output, HeadStep(x, layer.seen, *steps))
                a, b = (part.weight.detach() for part in layer.adapter_parts)  # type: ignore[operator]
                da, db = steps
                step = LoraStep(x.to(a.dtype), a, b, da, db, layer.scaling)
                if norm is None:
                    return self._how(output, step)
                plain = layer.without_bias(forward_ad.unpack_dual(output).primal)
                return self._how(output, step, Dora(norm, plain))

        return hook


@contextmanager
def forward_mode() -> Iterator[None]:
    """What forward-mode derivatives need; says of a model that has none what it is that has not."""
    try:
        with _ForwardMode():
            yield
    except (NotImplementedError, RuntimeError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        if not any(word in " ".join(said) for word in _MISSING):
            raise
        raise UnsupportedAdapterError(
            f"something in the model has no forward-mode derivative, which linearised samples need: {said[0]} Load it "
            "with attn_implementation='sdpa' or 'eager' and without custom kernels or quantised layers; samples as "
            "weights need none: linearised=False"
        ) from error


class _ForwardMode(TorchFunctionMode):
    """Functions in a form that forward mode has, or has at less cost.

    Attention by matrix products, as fused kernels have no forward mode: of this thread alone, which
    `torch.nn.attention.sdpa_kernel` is not. Linear layers on a matrix of all tokens: on [S, 1, d] forward mode copies
    their weights S times. What asks for gradients of hidden states, as checkpointed models do, gets none.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.requires_grad_:
            return args[0]
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and args and args[0].dim() > 2:
            x, *rest = args
            flat = func(x.reshape(-1, x.shape[-1]), *rest, **(kwargs or {}))
            return flat.view(*x.shape[:-1], flat.shape[-1])
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `scaled_dot_product_attention` computes without dropout; finite also where a query may see nothing."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    least = torch.finfo(scores.dtype).min
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, least)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, least)
    elif attn_mask is not None:
        scores = scores + attn_mask.clamp_min(least / 2)
    return scores.softmax(-1, dtype=lk.accumulation_dtype(scores.dtype)).to(value.dtype) @ value


_MISSING = ("forward AD", "forward-mode", "forward mode", "jvp", "vmap", "functorch")


class Step(Protocol):
    """A step of one layer's weights, at its input."""

    @property
    def x(self) -> Tensor:
        """The input [.., d_in]."""

    @property
    def samples(self) -> int:
        """n, where x has the rows of n samples."""

    def along(self, x: Tensor) -> Tensor:
        """The output's derivative at x [.., d_in]; with steps of n samples at x [n, .., d_in]."""

    def difference(self, x: Tensor) -> Tensor:
        """What the output changes by at x."""


@dataclass(frozen=True)
class LoraStep:
    """A step of lora_A and lora_B.

    Attributes:
        x: [.., d_in] in the dtype of the weights.
        a: A [r, d_in].
        b: B [d_out, r].
        da: dA, of each sample [n, r, d_in] where x has the rows of n samples.
        db: dB, likewise.
        scaling: s.
    """

    x: Tensor
    a: Tensor
    b: Tensor
    da: Tensor
    db: Tensor
    scaling: float

    @property
    def samples(self) -> int:
        return len(self.da)

    def along(self, x: Tensor) -> Tensor:
        """S (dB A x + B dA x)."""
        return self.scaling * ((x @ self.da.mT) @ self.b.mT + (x @ self.a.mT) @ self.db.mT)

    def difference(self, x: Tensor) -> Tensor:
        """S ((B + dB) (A + dA) - B A) x."""
        return self.scaling * ((x @ self.da.mT) @ (self.b + self.db).mT + (x @ self.a.mT) @ self.db.mT)


@dataclass(frozen=True)
class HeadStep:
    """A step dW [d_out, d] of a trained head, of each sample [n, d_out, d] where x has the rows of n samples."""

    x: Tensor
    seen: Callable[[Tensor], Tensor]
    dw: Tensor

    @property
    def samples(self) -> int:
        return len(self.dw)

    def along(self, x: Tensor) -> Tensor:
        """The product dW [x | 1]: the layer is linear in its weight."""
        return self.seen(x).to(self.dw.dtype) @ self.dw.mT

    difference = along


@dataclass(frozen=True)
class Dora:
    """What DoRA adds to a step of LoRA: its norm, and the output y - b of the trained weights."""

    norm: RowNorm
    plain: Tensor


def _derivative(output: Tensor, at: Step, dora: Dora | None = None) -> Tensor:
    """Adds the derivative along the step, which is dual, x taken as it is without one."""
    step = at.along(forward_ad.unpack_dual(at.x).primal)
    if dora is not None:
        step = dora.norm.gain * step - dora.plain * dora.norm.growth(at.da, at.db)  # type: ignore[attr-defined]
    moved: Tensor = output + step.to(output.dtype)
    return moved


def _difference(output: Tensor, at: Step, dora: Dora | None = None) -> Tensor:
    """Adds what the layer gives with other weights, less what it gives with its own."""
    step = at.difference(at.x)
    if dora is not None:
        gain = dora.norm.moved(at.da, at.db).gain  # type: ignore[attr-defined]
        step = gain * step + (gain / dora.norm.gain - 1) * dora.plain
    moved: Tensor = output + step.to(output.dtype)
    return moved


def _of_rows(output: Tensor, at: Step, dora: Dora | None = None) -> Tensor:
    """Adds the derivative for rows x [n S, .., d] of n samples."""
    x = forward_ad.unpack_dual(at.x).primal
    step = at.along(x.reshape(at.samples, -1, x.shape[-1]))
    if dora is not None:
        growth = dora.norm.growth(at.da, at.db)[:, None]  # type: ignore[attr-defined]
        step = dora.norm.gain * step - dora.plain.reshape(step.shape) * growth
    step = step.view(output.shape).to(output.dtype)
    value, before = forward_ad.unpack_dual(output)
    moved: Tensor = forward_ad.make_dual(value, step if before is None else before + step)
    return moved
