"""A backward pass that leaves nothing behind: no `.grad`, wherever a graph may lead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def send_back(
    u: Tensor, cotangent: Tensor, leaves: Sequence[Tensor], retain: bool, reentrant: bool
) -> Sequence[Tensor | None]:
    """Gradients of `leaves`, on the way to which all hooks run.

    Only what leads to the leaves is gone through: modules of the user's behind the model (an output function's own
    head) get no gradient. Reentrant checkpoints forbid that and write `.grad` wherever the graph leads; what was there
    before is put back.

    Args:
        u: [S, U] with its graph.
        cotangent: dL/du.
        leaves: tensors that require grad.
        retain: whether another pass follows.
        reentrant: whether there are reentrant checkpoints in the graph.
    """
    if not reentrant:
        return torch.autograd.grad(u, list(leaves), cotangent, retain_graph=retain, allow_unused=True)
    outside = {id(leaf): leaf for leaf in (*_leaves(u), *leaves)}.values()
    before = [(leaf, leaf.grad) for leaf in outside]
    for leaf in outside:
        leaf.grad = None
    try:
        torch.autograd.backward(u, cotangent, retain_graph=retain)
        return [leaf.grad for leaf in leaves]
    finally:
        for leaf, grad in before:
            leaf.grad = grad


def _leaves(u: Tensor) -> list[Tensor]:
    """All leaves that a backward pass from u would write to, but for those inside reentrant checkpoints."""
    seen, found, waiting = set(), [], [u.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of AccumulateGrad
        if isinstance(leaf, Tensor):
            found.append(leaf)
        waiting.extend(following for following, _ in node.next_functions)
    return found
