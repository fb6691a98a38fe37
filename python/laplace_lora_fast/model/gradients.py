"""A backward pass that leaves nothing behind: no `.grad`, wherever a graph may lead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
