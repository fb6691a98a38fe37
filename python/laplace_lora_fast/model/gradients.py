"""A backward pass that leaves nothing behind: no `.grad`, wherever a graph may lead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from laplace_lora_fast.errors import UnsupportedAdapterError


class Leaves:
    """All that gradients of layers are on the way to.

    Embeddings that were told to require grad, and an output function's own modules, are leaves beside the anchor.

    Args:
        parameters: whose gradients are wanted.
        reentrant: whether there are reentrant checkpoints in the graphs.

    Attributes:
        anchor: starts graphs.
        all: the leaves, the parameters first.
        reentrant: as told, or found.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], reentrant: bool) -> None:
        self._parameters, self.reentrant = list(parameters), reentrant
        self.anchor = torch.zeros((), requires_grad=True)
        self.all: list[Tensor] = [*self._parameters, self.anchor]
        self._elsewhere = True

    def find(self, u: Tensor, but: Sequence[Tensor]) -> None:
        """Looks for them in the graph of u, while there were others than the anchor in the last one.

        Args:
            u: [S, U] with its graph.
            but: tensors whose gradients are taken by themselves.

        Raises:
            UnsupportedAdapterError: they cannot be, for reentrant checkpoints.
        """
        if not (self._elsewhere or but):
            return
        found, reentrant = leaves_of(u)
        if but and reentrant:
            raise UnsupportedAdapterError(
                "a layer without streams of tokens has its Jacobian by autograd, which reentrant checkpoints do not "
                "allow: checkpoint with use_reentrant=False, or leave such layers out with layers=lambda name: .."
            )
        own = set(map(id, but))
        self.all = [*self._parameters, *(leaf for leaf in found if id(leaf) not in own)]
        self.reentrant = (self.reentrant and not but) or reentrant
        known = {id(self.anchor), *map(id, self._parameters)}
        self._elsewhere = any(id(leaf) not in known for leaf in self.all)


def send_back(
    u: Tensor, cotangent: Tensor, leaves: Sequence[Tensor], retain: bool, reentrant: bool
) -> Sequence[Tensor | None]:
    """Gradients of `leaves`, on the way to which all hooks run.

    Reentrant checkpoints allow no other way than one that writes `.grad` wherever the graph leads; what was there
    before is put back.

    Args:
        u: [S, U] with its graph.
        cotangent: dL/du.
        leaves: tensors that require grad: all that the layers' gradients are on the way to.
        retain: whether another pass follows.
        reentrant: whether there are reentrant checkpoints in the graph.
    """
    if not leaves:
        return []
    if not reentrant:
        return torch.autograd.grad(u, list(leaves), cotangent, retain_graph=retain, allow_unused=True)
    outside = {id(leaf): leaf for leaf in (*leaves_of(u)[0], *leaves)}.values()
    before = [(leaf, leaf.grad) for leaf in outside]
    for leaf in outside:
        leaf.grad = None
    try:
        torch.autograd.backward(u, cotangent, retain_graph=retain)
        return [leaf.grad for leaf in leaves]
    finally:
        for leaf, grad in before:
            leaf.grad = grad


def by_sequence(
    u: Tensor, cotangent: Tensor, targets: Sequence[Tensor], last: bool
) -> Iterator[Sequence[Tensor | None]]:
    """Gradients of tensors from each sequence's outputs alone; `last` frees the graph behind them."""
    for sequence in range(len(u)):
        own = torch.zeros_like(cotangent)
        own[sequence] = cotangent[sequence]
        retain = not last or sequence < len(u) - 1
        yield torch.autograd.grad(u, list(targets), own, retain_graph=retain, allow_unused=True)


def leaves_of(u: Tensor) -> tuple[list[Tensor], bool]:
    """All leaves that the graph of u leads to, but for those inside reentrant checkpoints, and whether it has any."""
    seen, found, waiting, reentrant = set(), [], [u.grad_fn], False
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        reentrant |= type(node).__name__ == "CheckpointFunctionBackward"
        leaf = getattr(node, "variable", None)  # of AccumulateGrad
        if isinstance(leaf, Tensor):
            found.append(leaf)
        waiting.extend(following for following, _ in node.next_functions)
    return found, reentrant
