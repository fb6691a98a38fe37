"""The ops, one a file: schema, checks, shape of the results, definition in plain PyTorch."""

from laplace_kernels.ops import (
    blocks,
    gram,
    gram_group,
    gram_sketch,
    jacobian,
    jacobian_stats,
    kron_apply,
    mirror,
    project,
)

__all__ = [
    "blocks",
    "gram",
    "gram_group",
    "gram_sketch",
    "jacobian",
    "jacobian_stats",
    "kron_apply",
    "mirror",
    "project",
]
