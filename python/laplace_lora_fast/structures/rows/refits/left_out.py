"""What examples of the training data look like to a model that has not seen them.

With V the posterior covariance of the functions f of a refitted model (mode.py), to second order (Vehtari et al. 2016,
"Bayesian leave-one-out cross-validation approximations for Gaussian latent variable models"),

    V_-n = (I - V_n W_n)^-1 V_n        f_-n = f_n - V_-n alpha_n

With B = I + S^T K S and H_n the block of B^-1 that belongs to example n, S_n^T V_n S_n = I - H_n, so that

    V_-n = S_n^-T (H_n^-1 - I) S_n^-1

needs no more than the diagonal blocks of an inverse, a third of R^3 beside a third for B's factor. Where W_n is so
small that I - H_n is rounding, V_n comes from its own columns of the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_lora_fast.structures.rows.layout import WIDTH
from laplace_lora_fast.structures.rows.refits.mode import Mode, Observations
from laplace_lora_fast.structures.rows.solver import cholesky_, inverse_blocks

LeftOut = tuple[Tensor, Tensor, Tensor, Tensor]  # examples, mean, covariance, targets

_SEEN = 1e-7  # least eigenvalue of I - H_n that says V_n to nine digits


def leave_one_out(
    kernel: Tensor, observed: Observations, mode: Mode, weight: float = 1.0
) -> list[tuple[Tensor, Tensor]]:
    """Mean [N_b, K] and covariance [N_b, K, K] of the functions of every block's examples under the data without each.

    Args:
        kernel: K [R, R], fp64.
        observed: prior functions and targets.
        mode: `newton` of both.
        weight: w, of the kernel.
    """
    layout, roots = observed.layout, mode.roots
    chol = cholesky_(roots.plus_identity(kernel, weight))
    results = []
    for rows, functions, root, gradient, inverse in zip(
        layout.rows,
        layout.split(mode.functions),
        roots.blocks,
        observed.gradient(mode.functions),
        inverse_blocks(chol, layout),
        strict=True,
    ):
        unit = torch.eye(inverse.shape[1], dtype=kernel.dtype, device=kernel.device)
        few = torch.linalg.eigvalsh(unit - inverse)[:, 0] < _SEEN
        # S_n may be singular there: it is not asked
        root_inverse = torch.linalg.inv(torch.where(few[:, None, None], unit, root))
        cavity = root_inverse.mT @ (torch.linalg.inv(inverse) - unit) @ root_inverse
        for chosen in few.nonzero().flatten().split(max(1, WIDTH // len(unit))):
            place = rows[chosen.cpu()].to(kernel.device)
            posterior = _posterior(chol, mode, kernel, place, weight)
            precision = root[chosen] @ root[chosen].mT
            cavity[chosen] = torch.linalg.solve(unit - posterior @ precision, posterior)
        cavity = (cavity + cavity.mT) / 2
        results.append((functions - (cavity @ gradient[..., None]).squeeze(-1), cavity))
    return results


def _posterior(chol: Tensor, mode: Mode, kernel: Tensor, place: Tensor, weight: float) -> Tensor:
    """V_n [n, K, K] of examples whose rows are `place` [n, K]."""
    columns = weight * kernel[:, place.flatten()]
    seen = torch.linalg.solve_triangular(chol, mode.roots.transposed_times(columns), upper=False)
    seen = seen.view(len(kernel), *place.shape)
    own = weight * kernel[place[:, :, None], place[:, None, :]]
    return own - torch.einsum("rni,rnj->nij", seen, seen)
