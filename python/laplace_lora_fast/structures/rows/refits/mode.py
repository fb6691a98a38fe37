"""Where the linearised model is under its prior: the optimum of one R x R problem, by Newton's method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laplace_lora_fast.errors import NumericalError
from laplace_lora_fast.likelihoods import Likelihood
from laplace_lora_fast.structures.rows.layout import BlockDiagonal, Layout
from laplace_lora_fast.structures.rows.precisions.equivalent import Equivalent
from laplace_lora_fast.structures.rows.solver import cholesky_, inverse_blocks, solved

_STEPS = 100  # of Newton's method, which takes about five
_ROUNDS = 30  # of x and the mode, which take about five


@dataclass(frozen=True)
class Mode:
    """The optimum under one prior; all fp64.

    Attributes:
        functions: f [R].
        alpha: [R].
        roots: S.
        log_evidence: of the refitted model.
        dimension: tr[K_s W (I + K W)^-1], how many functions the data determine of the sketched weights; nan unless
            asked for.
        shrinkage: x, where there is a sketch: its precisions were (1 - x) times the prior's.
    """

    functions: Tensor
    alpha: Tensor
    roots: BlockDiagonal
    log_evidence: float
    dimension: float = math.nan
    shrinkage: float = 0.0


@dataclass(frozen=True)
class Observations:
    """What the linearised model is refitted to.

    Attributes:
        layout: of the rows.
        likelihood: of the outputs.
        prior: m [N_b, K] fp64 of every block: the functions with the adapter switched off.
        targets: of every block, as the likelihood has them.
        precision: of the noise, 1 / sigma^2; 1 without.
    """

    layout: Layout
    likelihood: Likelihood
    prior: Sequence[Tensor]
    targets: Sequence[Tensor]
    precision: float = 1.0

    def log_likelihood(self, f: Tensor) -> Tensor:
        """Scalar log p(y | f) of functions [R]."""
        blocks = zip(self._outputs(f), self.targets, strict=True)
        total = sum(self.likelihood.log_likelihood(outputs, targets) for outputs, targets in blocks)
        assert isinstance(total, Tensor)
        if not self.likelihood.has_noise:
            return total
        normaliser = self.likelihood.log_normaliser(f.numel(), self.precision**-0.5)  # type: ignore[attr-defined]
        return total * self.precision - float(normaliser)

    def gradient(self, f: Tensor) -> list[Tensor]:
        """d/df log p(y | f) of every block, [N_b, K]."""
        return [
            -self.likelihood.residual(outputs, targets)[:, outputs.shape[1] - size :] * self.precision
            for outputs, targets, size in zip(
                self._outputs(f), self.targets, self.layout.block_sizes, strict=True
            )
        ]

    def roots(self, f: Tensor) -> BlockDiagonal:
        """S with S S^T the negative Hessian in f."""
        roots = [self.likelihood.functions_root(outputs) for outputs in self._outputs(f)]
        scale = math.sqrt(self.precision)
        return BlockDiagonal(self.layout, [root * scale for root in roots])

    def _outputs(self, f: Tensor) -> list[Tensor]:
        return [self.likelihood.from_functions(block) for block in self.layout.split(f)]


def newton(
    kernel: Tensor,
    observed: Observations,
    start: Tensor | None = None,
    part: Tensor | None = None,
    tolerance: float = 1e-9,
    weight: float = 1.0,
) -> Mode:
    """The mode of p(f | y) for f ~ N(m, w K) (Rasmussen and Williams 2006, algorithm 3.3, with step halving).

    Args:
        kernel: K [R, R], fp64.
        observed: prior functions and targets.
        start: alpha [R] to begin from, that of a similar kernel; None for zero.
        part: K_s [R, R], the part of K whose dimension is asked for, an inverse more; half of one for K itself.
        tolerance: of the last step, relative; what is left after it is about its square.
        weight: w.

    Raises:
        NumericalError: no convergence.
    """
    layout = observed.layout
    prior = layout.join(observed.prior)

    def at(alpha: Tensor) -> tuple[Tensor, float]:
        shift = weight * (kernel @ alpha)
        f = prior + shift
        return f, float(observed.log_likelihood(f) - 0.5 * (alpha * shift).sum())

    alpha, last = torch.zeros_like(prior), math.inf
    f, value = at(alpha)
    if start is not None and (tried := at(start))[1] > value:
        alpha, (f, value) = start, tried
    for _ in range(_STEPS):
        roots = observed.roots(f)
        chol = cholesky_(roots.plus_identity(kernel, weight))
        shift = (f - prior)[:, None]
        b = roots.times(roots.transposed_times(shift)) + layout.join(observed.gradient(f))[:, None]
        inner = roots.transposed_times(weight * (kernel @ b))
        target = (b - roots.times(solved(chol, inner)))[:, 0]
        step, tried = 1.0, at(target)
        while tried[1] < value - 1e-12 * (1 + abs(value)) and step > 1e-6:
            step /= 2
            tried = at(alpha + step * (target - alpha))
        moved = float((tried[0] - f).abs().max() / (1 + f.abs().max()))
        alpha, (f, value) = alpha + step * (target - alpha), tried
        # Near the optimum each step is about the square of the last: small means there, as large as the last rounding.
        there, rounding = moved <= tolerance, last < 1e-5 and moved > last / 2
        last = moved if step == 1 else math.inf
        if there or rounding:
            log_det = 2 * chol.diagonal().log().sum()
            gamma = math.nan if part is None else _dimension(chol, roots, kernel, part, weight)
            return Mode(f, alpha, observed.roots(f), float(value - 0.5 * log_det), gamma)
    raise NumericalError(f"the refit did not converge in {_STEPS} steps: try larger prior precisions")


def _dimension(chol: Tensor, roots: BlockDiagonal, kernel: Tensor, part: Tensor, weight: float) -> float:
    """tr[w K_s W (I + w K W)^-1], from the Cholesky factor of I + w S^T K S."""
    if part is kernel:
        blocks = inverse_blocks(chol, roots.layout)
        return len(chol) - float(torch.stack([each.diagonal(dim1=1, dim2=2).sum() for each in blocks]).sum())
    return weight * float((torch.cholesky_inverse(chol) * roots.whiten(part)).sum())


def equivalent_mode(
    sketch: Tensor,
    whole: Tensor,
    observed: Observations,
    equivalent: Equivalent,
    near: Mode | None = None,
    tolerance: float = 1e-9,
    weight: float = 1.0,
) -> Mode:
    """The mode under w (K_w + K_s / (1 - x)), x what the dimension of the sketched part there asks for.

    Args:
        sketch: K_s [R, R] of sketched rows, fp64.
        whole: K_w [R, R] of whole ones, or a scalar 0.
        observed: prior functions and targets.
        equivalent: of the sketch.
        near: to begin from: its x, and its alpha for this weight.
        tolerance: as for `newton`.
        weight: w.
    """
    x, start = (0.0, None) if near is None else (near.shrinkage, near.alpha)
    for _ in range(_ROUNDS):
        if whole.dim():
            part = sketch / (1 - x)
            mode = newton(whole + part, observed, start, part, tolerance, weight)
        else:
            mode = newton(sketch, observed, start, sketch, tolerance, weight / (1 - x))
        wanted = equivalent.shrinkage_at(mode.dimension)
        if abs(wanted - x) < max(1e-7, tolerance):
            break
        start, x = mode.alpha * (1 - wanted) / (1 - x), wanted
    correction = log_det_of_shrinkage(mode.dimension, x)
    return replace(mode, shrinkage=x, log_evidence=mode.log_evidence - 0.5 * correction)


def log_det_of_shrinkage(dimension: float, x: float) -> float:
    """What the whole rows' logdet(I + K) has more than the sketch's at the precision that it takes in their place.

    The integral of the dimension d over log(1 - d / q), with q = d / x as it is there: d (1 + log(1 - x) / x) <= 0.
    """
    return dimension * (1 + math.log1p(-x) / x) if x > 0 else 0.0
