"""Finds the LoRA layers of a model and taps their (input, output-gradient) streams. The only file that imports peft.

A LoRA layer computes y = W0 x + s B A x. With g = dL/dy, everything a Kronecker-factored curvature of A and B needs
follows from the two streams x and g at the layer itself:

    input of lora_B            z   = A x
    gradient at lora_B output  g_B = s g
    gradient at lora_A output  g_A = s B^T g
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from laplace_lora_fast.devices import device_of
from laplace_lora_fast.errors import DeferredChecks, UnsupportedAdapterError
from laplace_lora_fast.heads import Head, Inputs
from laplace_lora_fast.isolation import Isolation, first_example
from laplace_lora_fast.modes import (
    autocast_of_caller,
    checkpointing_layers,
    evaluation_mode,
    frozen,
    input_embeddings,
    is_offloaded,
    reentrant,
    refuse_inference_tensors,
    without_fast_path,
)
from laplace_lora_fast.selection import Layers as Layers
from laplace_lora_fast.selection import selected
from laplace_lora_fast.sharing import SharedInputs
from laplace_lora_fast.streams import GraphStart, Observer, Tapped, tokens_and_mask


@dataclass(frozen=True)
class Site:
    """One LoRA layer with its active adapter.

    Attributes:
        name: the layer's name in `model.named_modules()`.
        module: the LoRA layer.
        adapter: name of the active adapter.
        scaling: s, alpha / r (or alpha / sqrt(r) for rsLoRA).
        rows: [C] indices of the output features that carry gradient, or None for all of them. Set for an adapted
            language-model head with answer tokens: only the answers' rows of lora_B see the data.
    """

    name: str
    module: nn.Module
    adapter: str
    scaling: float
    rows: Tensor | None = None

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """The parameters of lora_A [r, d_in] and of lora_B, all its rows."""
        a, b = (self._side(side).weight for side in "AB")
        return a, b  # type: ignore[return-value]

    @property
    def A(self) -> Tensor:
        """lora_A's weight [r, d_in], detached."""
        return self.weights[0].detach()

    @property
    def B(self) -> Tensor:
        """lora_B's weight [d_out, r], detached, restricted to `rows`."""
        weight = self.weights[1].detach()
        return weight if self.rows is None else weight[self.rows.to(weight.device)]

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def d_in(self) -> int:
        return self.A.shape[1]

    @property
    def d_out(self) -> int:
        return int(self.B.shape[0]) if self.rows is None else len(self.rows)

    def check(self) -> None:
        """Raises UnsupportedAdapterError if the adapter has been switched, merged or disabled since."""
        active = _active_adapter(self.name, self.module)  # type: ignore[arg-type]
        if active != self.adapter:
            raise UnsupportedAdapterError(
                f"layer {self.name!r} has adapter {active!r} active, expected {self.adapter!r}: call model.set_adapter"
            )
        _refuse_unsupported(self.name, self.module, self.adapter)  # type: ignore[arg-type]

    def switch_off(self) -> RemovableHandle:
        """Makes B A zero until the handle is removed; a bias of lora_B, which is left alone, stays."""
        return self._side("A").register_forward_hook(lambda *args: torch.zeros_like(args[-1]))

    def _side(self, side: str) -> nn.Module:
        layers: nn.ModuleDict = getattr(self.module, f"lora_{side}")
        return layers[self.adapter]

    def weight_name(self, side: str) -> str:
        """Name of the weight of `side` ("A" or "B") in `model.named_parameters()`."""
        return f"{self.name}.lora_{side}.{self.adapter}.weight"


def find_sites(model: nn.Module, head: Head, layers: Layers = None) -> list[Site]:
    """Lists the LoRA layers whose adapter is active, in the order of `model.named_modules()`.

    Args:
        model: a PEFT model.
        head: says whether the language-model head is restricted to answer tokens.
        layers: see `selected`.

    Raises:
        UnsupportedAdapterError: there is no LoRA layer, or one whose adapter is not plain LoRA on a linear layer
            (DoRA and other variants, Conv, Embedding, fused attention), is merged, disabled, or mixed with another.
    """
    refuse_inference_tensors(model)
    sites = []
    for name, module in model.named_modules():
        if not isinstance(module, lora.LoraLayer):
            continue
        adapter = _active_adapter(name, module)
        if adapter is not None:
            _refuse_unsupported(name, module, adapter)
            rows = head.answer_token_ids if module is head.output_layer else None
            rows = None if rows is None else rows.to(device_of(module))
            sites.append(Site(name, module, adapter, float(module.scaling[adapter]), rows))
    if not sites:
        raise UnsupportedAdapterError(
            "model has no LoRA layer with an active adapter: pass a peft.PeftModel with a LoRA adapter"
        )
    chosen = selected(model, [site.name for site in sites], layers)
    return [site for site in sites if site.name in chosen]


def _active_adapter(name: str, module: lora.LoraLayer) -> str | None:
    here = {*module.lora_A, *module.lora_embedding_A}
    active = [adapter for adapter in module.active_adapters if adapter in here]
    if len(active) > 1:
        raise UnsupportedAdapterError(
            f"layer {name!r} mixes the adapters {active}: activate one with model.set_adapter(...)"
        )
    return active[0] if active else None


def _refuse_unsupported(name: str, module: lora.LoraLayer, adapter: str) -> None:
    kind = type(module).__name__
    if is_offloaded(module):
        raise UnsupportedAdapterError(
            f"layer {name!r} is offloaded: load the model without offloading, which leaves its weights on no device"
        )
    if module.merged:
        raise UnsupportedAdapterError(
            f"layer {name!r} has its adapter merged: call model.unmerge_adapter() first"
        )
    if module.disable_adapters:
        raise UnsupportedAdapterError(f"layer {name!r} has its adapters disabled: enable them first")
    if module.use_dora.get(adapter, False) or adapter in module.lora_variant:
        dora = module.use_dora.get(adapter, False)
        what = "DoRA" if dora else type(module.lora_variant[adapter]).__name__.removesuffix("Variant")
        raise UnsupportedAdapterError(
            f"layer {name!r} uses a LoRA variant ({what}): only plain LoRA is supported"
        )
    linear = adapter in module.lora_A and all(
        isinstance(weights[adapter], nn.Linear) for weights in (module.lora_A, module.lora_B)
    )
    if not linear or isinstance(module, lora.MultiheadAttention | lora.ParamWrapper):
        raise UnsupportedAdapterError(
            f"layer {name!r} is LoRA on a {kind} layer: only linear layers are supported; exclude it in LoraConfig"
        )


def parameters_left_alone(model: nn.Module, sites: list[Site]) -> list[str]:
    """Names of trained parameters that are not LoRA weights (`modules_to_save`, biases): they stay at their MAP."""
    treated = {site.weight_name(side) for site in sites for side in "AB"}
    saved = tuple(
        f"{name}.modules_to_save.{sites[0].adapter}."
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    )
    return [
        name
        for name, parameter in model.named_parameters()
        if name not in treated and (parameter.requires_grad or name.startswith(saved))
    ]


def read_adapter(
    source: str | PathLike[str] | Mapping[str, Tensor], sites: list[Site]
) -> list[tuple[Tensor, Tensor]]:
    """Reads the (A, B) weights of every site from a PEFT adapter folder or a state dict.

    Args:
        source: an adapter folder as `save_pretrained` writes it, or a state dict whose keys are parameter names with
            or without the adapter's name in them.
        sites: the layers to look up.

    Raises:
        UnsupportedAdapterError: a weight is missing or has another shape; names the layer.
    """
    state = source if isinstance(source, Mapping) else load_peft_weights(str(source), device="cpu")
    weights = []
    for site in sites:
        pair = []
        for side, shape in zip("AB", (weight.shape for weight in site.weights), strict=True):
            name = site.weight_name(side)
            value = state.get(name, state.get(name.replace(f".{site.adapter}.weight", ".weight")))
            if value is None or value.shape != shape:
                found = "no weight" if value is None else f"shape {tuple(value.shape)}"
                raise UnsupportedAdapterError(
                    f"adapter state has {found} for {name!r}, expected {tuple(shape)}"
                )
            pair.append(value if side == "A" or site.rows is None else value[site.rows.to(value.device)])
        weights.append((pair[0], pair[1]))
    return weights


class Tap:
    """Forward and backward passes of a model with an observer on its LoRA layers.

    Used as a context manager. Inside, every parameter is frozen and the model is in evaluation mode; on exit, also
    after an error, training flags, `requires_grad` flags and hooks are as before. The caller's autocast holds for the
    model's forward pass only, not for what is computed from its outputs.

    Gradient checkpointing never counts anything twice: inputs are observed in the forward phase only (the recomputed
    forward runs in the backward phase), gradients in the backward phase only.

    Gradients at pads are refused in every batch: at once on the CPU, elsewhere on exit.

    Args:
        model: the model the sites belong to.
        head: turns a batch into logits.
        sites: the layers to tap.
        observer: receives the streams. None: forward passes only, without autograd.
        groups: for each site the index of the site whose input tensor it shares (itself when it does not); None
            discovers them in the first forward pass. A later pass that contradicts them is refused.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        sites: Sequence[Tapped],
        observer: Observer | None,
        groups: list[int] | None = None,
    ) -> None:
        self.model, self.head, self.sites, self.observer = model, head, sites, observer
        self._sharing = SharedInputs([site.name for site in sites], groups)
        self.reached: set[int] = set()  # sites that saw a gradient
        self._checks = DeferredChecks()
        self._isolation = Isolation(self._checks)
        self._forward_phase = self._checks_rows = self._rows_checked = False
        self._inputs: Inputs | None = None
        self._stack = ExitStack()

    @property
    def groups(self) -> list[int] | None:
        """For each site the index of the site whose input it shares; None before the first forward pass."""
        return self._sharing.groups

    def __enter__(self) -> Tap:
        with ExitStack() as stack:
            checkpointing = checkpointing_layers(self.model)
            stack.enter_context(evaluation_mode(self.model, checkpointing))
            stack.enter_context(frozen(self.model))
            stack.enter_context(self.head.installed())
            stack.enter_context(without_fast_path())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(self.observer is not None))
            self._autocast = autocast_of_caller(self.model)
            stack.enter_context(torch.autocast(self._autocast.device, enabled=False))
            self._anchor = torch.zeros((), requires_grad=True)
            for index, site in enumerate(self.sites):
                site.check()
                if self.observer is None:
                    continue
                hook = self._forward_hook(self.observer, index)
                # Before hooks of the user, which may change the output.
                handle = site.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            if self.observer is not None and reentrant(checkpointing):  # needs an input that requires grad
                embedding = input_embeddings(self.model)
                stack.callback(embedding.register_forward_hook(lambda *a: self._start_graph(a[-1])).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._stack.close()
        if kind is None:
            self._checks.settle()
            self.head.rows_checked |= self._rows_checked

    def forward(self, inputs: Inputs) -> Tensor:
        """Runs the model and shows the observer every distinct input. Returns logits [N, C] with their graph."""
        with self._autocast:
            inputs = self.head.placed(self.model, inputs)
        self._inputs = inputs
        self._sharing.start()
        self._isolation.start_batch()
        self._forward_phase = True
        try:
            with self._autocast:
                logits = self.head.logits(self.model, inputs)
        finally:
            self._forward_phase = False
        if self.observer is None:
            return logits
        self._sharing.finish()
        if not logits.requires_grad:
            raise UnsupportedAdapterError(
                "the logits do not depend on any LoRA layer of the active adapter (detached outputs, or gradient "
                "checkpointing with use_reentrant=True in custom code whose inputs do not require grad)"
            )
        return logits

    def prior_logits(self, inputs: Inputs) -> Tensor:
        """Logits [N, C] with the adapter switched off in every tapped LoRA layer: no graph, nothing observed."""
        with ExitStack() as stack, torch.no_grad(), self._autocast:
            for site in self.sites:
                if isinstance(site, Site):
                    stack.callback(site.switch_off().remove)
            return self.head.logits(self.model, self.head.placed(self.model, inputs))

    def check_rows(self, logits: Tensor) -> None:
        """Between `forward` and `backward`: refuses layers whose rows are not the examples, in the model's first batch.

        One backward pass more, from the first example's logits alone, which the observer does not see.
        """
        if self.head.rows_checked or self._rows_checked or len(logits) == 1:
            return
        self._checks_rows = True
        try:
            self.backward(logits, first_example(logits), last=False)
        finally:
            self._checks_rows = False
        self._rows_checked = True

    def backward(self, logits: Tensor, cotangent: Tensor, last: bool) -> None:
        """Sends `cotangent` [N, C] back from `logits` and shows the observer every gradient.

        Args:
            logits: what `forward` returned.
            cotangent: dL/dlogits; row n only reaches example n.
            last: frees the graph behind this pass.
        """
        torch.autograd.backward(logits, cotangent.to(logits.dtype), retain_graph=not last)

    def _forward_hook(self, observer: Observer, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if self._forward_phase:
                x = args[0] if args else next(iter(kwargs.values()))
                with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                    self._observe_input(observer, index, x)
            if not torch.is_grad_enabled():  # first run of a reentrant checkpoint: its rerun has the graph
                return output
            output = self._start_graph(output)
            output.register_hook(lambda g: self._observe_gradient(observer, index, g))
            return output

        return hook

    def _start_graph(self, output: Tensor) -> Tensor:
        if output.requires_grad or not torch.is_grad_enabled():
            return output
        started: Tensor = GraphStart.apply(output, self._anchor)  # type: ignore[no-untyped-call]
        return started

    def _observe_input(self, observer: Observer, index: int, x: Tensor) -> None:
        if self._sharing.leads(index, x):
            tokens, mask = self._tokens(self.sites[index], x.detach())
            self._sharing.keep(index, tokens)
            self._isolation.observe_input(index, tokens, mask)
            observer.observe_input(index, tokens, mask)

    def _observe_gradient(self, observer: Observer, index: int, g: Tensor) -> None:
        """Runs in a backward pass, which is without autograd and autocast already."""
        site = self.sites[index]
        g, mask = self._tokens(site, g)
        if self._checks_rows:
            self._isolation.require_own_row(g, mask, site.name)
            return
        self._isolation.require_off_pads(self._sharing.leaders[index], g, site.name)
        if site.rows is not None:
            g = g.index_select(-1, site.rows.to(g.device))
        self.reached.add(index)
        observer.observe_gradient(index, g, mask)

    def _tokens(self, site: Tapped, x: Tensor) -> tuple[Tensor, Tensor | None]:
        assert self._inputs is not None
        return tokens_and_mask(x, self._inputs, site.name, site.module is self.head.output_layer)
