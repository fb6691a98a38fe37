"""The linearised model refitted under its prior, in row space, and its leave-one-out predictions.

A trained adapter is not the optimum of the objective that the Laplace posterior is built on: it was trained without
that prior, and for too long or too briefly. The linearised model's own optimum under the prior is an R x R problem
(Immer, Korzepa and Bauer 2021, "Improving predictions of Bayesian neural nets via local linearization"). As a Gaussian
process over the training outputs (Rasmussen and Williams 2006, sections 3.4 and 3.5):

    f = m + K alpha        K = J Lambda^-1 J^T, m the functions with the adapter switched off, at the prior mean
    alpha = d/df log p(y | f),  W = S S^T = -d2/df2 log p(y | f) at the optimum
    evidence = log p(y | f) - alpha^T K alpha / 2 - logdet(I + S^T K S) / 2

and with V the posterior covariance of f, what example n looks like to a model that has not seen it is, to second order
(Vehtari et al. 2016, "Bayesian leave-one-out cross-validation approximations for Gaussian latent variable models"),

    V_-n = (I - V_n W_n)^-1 V_n        f_-n = f_n - V_-n alpha_n

so that the prior precision can be chosen by the leave-one-out likelihood: no held-out data, no model pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laplace_lora_fast.errors import NumericalError
from laplace_lora_fast.likelihoods import Likelihood
from laplace_lora_fast.structures.base import Curvature
from laplace_lora_fast.structures.rows.algebra import RowCurvature
from laplace_lora_fast.structures.rows.layout import BlockDiagonal, Layout
from laplace_lora_fast.structures.rows.precisions.equivalent import Equivalent
from laplace_lora_fast.structures.rows.solver import Solver, one_solver
from laplace_lora_fast.structures.search import maximum_on_log_axis

LeftOut = tuple[Tensor, Tensor, Tensor, Tensor]  # examples, mean, covariance, targets

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
) -> Mode:
    """The mode of p(f | y) for f ~ N(m, kernel) (Rasmussen and Williams 2006, algorithm 3.3, with step halving).

    Args:
        kernel: K [R, R], fp64.
        observed: prior functions and targets.
        start: alpha [R] to begin from, that of a similar kernel; None for zero.
        part: K_s [R, R], the part of K whose dimension is asked for, an inverse more.
        tolerance: of the last step, relative; what is left after it is about its square.

    Raises:
        NumericalError: no convergence.
    """
    layout = observed.layout
    prior = layout.join(observed.prior)
    identity = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)

    def at(alpha: Tensor) -> tuple[Tensor, float]:
        shift = kernel @ alpha
        f = prior + shift
        return f, float(observed.log_likelihood(f) - 0.5 * (alpha * shift).sum())

    alpha, last = torch.zeros_like(prior), math.inf
    f, value = at(alpha)
    if start is not None and (tried := at(start))[1] > value:
        alpha, (f, value) = start, tried
    for _ in range(_STEPS):
        roots = observed.roots(f)
        chol = torch.linalg.cholesky(identity + roots.whiten(kernel))
        shift = (f - prior)[:, None]
        b = roots.times(roots.transposed_times(shift)) + layout.join(observed.gradient(f))[:, None]
        inner = roots.transposed_times(kernel @ b)
        target = (b - roots.times(torch.cholesky_solve(inner, chol)))[:, 0]
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
            gamma = math.nan
            if part is not None:
                gamma = float((torch.cholesky_inverse(chol) * roots.whiten(part)).sum())
            return Mode(f, alpha, observed.roots(f), float(value - 0.5 * log_det), gamma)
    raise NumericalError(f"the refit did not converge in {_STEPS} steps: try larger prior precisions")


def equivalent_mode(
    sketch: Tensor,
    whole: Tensor,
    observed: Observations,
    equivalent: Equivalent,
    start: Tensor | None = None,
    tolerance: float = 1e-9,
) -> Mode:
    """The mode under K_w + K_s / (1 - x), x what the dimension of the sketched part there asks for.

    Args:
        sketch: K_s [R, R] of sketched rows, fp64.
        whole: K_w [R, R] of whole ones, or a scalar 0.
        observed: prior functions and targets.
        equivalent: of the sketch.
        start: as for `newton`.
        tolerance: as for `newton`.
    """
    x = 0.0
    mode = newton(whole + sketch, observed, start, part=sketch, tolerance=tolerance)
    for _ in range(_ROUNDS):
        wanted = equivalent.shrinkage_at(mode.dimension)
        if abs(wanted - x) < max(1e-7, tolerance):
            break
        start = mode.alpha * (1 - wanted) / (1 - x)
        part = sketch / (1 - wanted)
        mode = newton(whole + part, observed, start, part=part, tolerance=tolerance)
        x = wanted
    correction = log_det_of_shrinkage(mode.dimension, x)
    return replace(mode, shrinkage=x, log_evidence=mode.log_evidence - 0.5 * correction)


def log_det_of_shrinkage(dimension: float, x: float) -> float:
    """What the whole rows' logdet(I + K) has more than the sketch's at the precision that it takes in their place.

    The integral of the dimension d over log(1 - d / q), with q = d / x as it is there: d (1 + log(1 - x) / x) <= 0.
    """
    return dimension * (1 + math.log1p(-x) / x) if x > 0 else 0.0


def leave_one_out(kernel: Tensor, observed: Observations, mode: Mode) -> list[tuple[Tensor, Tensor]]:
    """Mean [N_b, K] and covariance [N_b, K, K] of the functions of every block's examples under the data without each.

    Args:
        kernel: K [R, R], fp64.
        observed: prior functions and targets.
        mode: `newton` of both.
    """
    layout = observed.layout
    identity = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    chol = torch.linalg.cholesky(identity + mode.roots.whiten(kernel))
    seen = torch.linalg.solve_triangular(chol, mode.roots.transposed_times(kernel), upper=False)
    results = []
    for rows, size, functions, roots, gradient in zip(
        layout.rows,
        layout.block_sizes,
        layout.split(mode.functions),
        mode.roots.blocks,
        observed.gradient(mode.functions),
        strict=True,
    ):
        place = rows.to(kernel.device)
        own = kernel[place[:, :, None], place[:, None, :]]
        columns = seen[:, place]  # [R, N, K]
        posterior = own - torch.einsum("rni,rnj->nij", columns, columns)
        unit = torch.eye(size, dtype=kernel.dtype, device=kernel.device)
        cavity = torch.linalg.solve(unit - posterior @ (roots @ roots.mT), posterior)
        cavity = (cavity + cavity.mT) / 2
        results.append((functions - (cavity @ gradient[..., None]).squeeze(-1), cavity))
    return results


class RefittedCurvature(RowCurvature):
    """The curvature of the linearised model at its own optimum, which moves with the prior.

    Args:
        rows: the rows.
        observed: what they are refitted to.
    """

    refitted = True

    def __init__(self, rows: RowCurvature, observed: Observations) -> None:
        super().__init__(rows.names, rows.means, rows.rows, rows.projections, rows.roots, rows.kernels)
        self.observed = observed
        self._latest: tuple[list[float], Mode] | None = None

    def scaled(self, factor: float) -> RefittedCurvature:
        observed = replace(self.observed, precision=self.observed.precision * factor)
        return RefittedCurvature(super().scaled(factor), observed)

    def mode(self, prior_precision: Tensor) -> Mode:
        """The optimum under a prior precision, fp64 [n_weights]; the latest one is kept."""
        key = prior_precision.tolist()
        if self._latest is None or self._latest[0] != key:
            self._latest = key, self._mode(prior_precision)
        return self._latest[1]

    def _mode(self, prior_precision: Tensor) -> Mode:
        sketch, whole = self.kernels_apart(prior_precision)
        if not self.kernels.sketched:
            return newton(whole, self.observed)
        equivalent, _ = self.equivalent(prior_precision)
        return equivalent_mode(sketch, whole, self.observed, equivalent)

    def kernels_apart(self, prior_precision: Tensor) -> tuple[Tensor, Tensor]:
        """K_s of the sketched rows and K_w of the whole ones, fp64 [R, R]; a scalar 0 where there are none."""
        sketched = torch.tensor(self.kernels.are_sketched)
        apart = [(1 / prior_precision) * mine for mine in (sketched, ~sketched)]
        none = torch.zeros((), dtype=torch.float64, device=self.home)
        parts = [self.kernels.total(each.tolist()) if bool(each.any()) else none for each in apart]
        return parts[0], parts[1]

    def effective(self, prior_precision: Tensor) -> Tensor:
        return prior_precision * self.kernels.factors(self.mode(prior_precision).shrinkage)

    def roots_of_equivalent(self) -> BlockDiagonal:
        """At the prior's functions: at the trained model's they vanish where it is certain."""
        return self.observed.roots(self.observed.layout.join(self.observed.prior)).to(self.means[0])

    def log_det_ratio(self, prior_precision: Tensor) -> Tensor:
        mode = self.mode(prior_precision)
        ratio = Curvature.log_det_ratio(self, prior_precision)
        return ratio + log_det_of_shrinkage(mode.dimension, mode.shrinkage) if mode.shrinkage else ratio

    def roots_at(self, prior_precision: Tensor) -> BlockDiagonal:
        return self.mode(prior_precision).roots

    def log_marginal_likelihood(
        self, prior_precision: Tensor, log_likelihood: float, penalty: float
    ) -> Tensor:
        """Of the refitted model, which knows its own likelihood and penalty."""
        return torch.tensor(self.mode(prior_precision).log_evidence, dtype=torch.float64)

    def maximise_evidence(self, keys: Sequence[str], squared_norms: Sequence[float]) -> dict[str, float]:
        """A search over one prior precision; ValueError for several."""
        if len(set(keys)) > 1:
            raise ValueError("Rows(refit=True) is tuned with one prior precision: pass Evidence(per='all')")
        ones = torch.ones(len(keys), dtype=torch.float64)
        return {keys[0]: maximum_on_log_axis(lambda lam: self.mode(lam * ones).log_evidence, 1e-6, 1e8)}

    def maximise_evidence_with_noise(self, keys: Sequence[str]) -> tuple[dict[str, float], float]:
        """The prior precision and the noise s of a Gaussian likelihood, together.

        The evidence is that of y - m ~ N(0, s^2 (I + K / mu)), mu the prior precision times s^2: for each mu the best
        s^2 is q / R, q the quadratic form at unit noise. What is left is a search over mu.
        """
        ones = torch.ones(len(self.names), dtype=torch.float64)

        def at(mu: float) -> tuple[float, float]:
            """Evidence at the best noise, and that noise."""
            mode, layout = self.mode(mu * ones), self.observed.layout
            residual = layout.join(self.observed.targets) - layout.join(self.observed.prior)
            quadratic, count = float(mode.alpha @ residual), self.n_rows
            variance = quadratic / count
            return mode.log_evidence + 0.5 * (quadratic - count - count * math.log(variance)), variance**0.5

        if len(set(keys)) > 1:
            raise ValueError("Rows(refit=True) is tuned with one prior precision: pass Evidence(per='all')")
        mu = maximum_on_log_axis(lambda mu: at(mu)[0], 1e-6, 1e8)
        noise = at(mu)[1]
        return {keys[0]: mu / noise**2}, noise

    def leave_one_out(self, prior_precision: Tensor) -> list[LeftOut]:
        """For every block its examples, their mean [N_b, K] and covariance [N_b, K, K] without each, and targets."""
        kernel = self.kernels.total((1 / self.effective(prior_precision)).tolist())
        blocks = leave_one_out(kernel, self.observed, self.mode(prior_precision))
        layout = self.observed.layout
        return [
            (examples, *gaussian, targets)
            for examples, gaussian, targets in zip(
                layout.examples, blocks, self.observed.targets, strict=True
            )
        ]

    def solvers(self, kernels: Tensor, parts: Tensor, precisions: Tensor) -> Iterator[Solver]:
        """A refit and a factorisation a prior."""
        for place, column in enumerate(precisions.mT):
            mode = self.mode(column[parts])
            members = [parts.tolist().index(part) for part in range(len(kernels))]
            own = column * self.kernels.factors(mode.shrinkage)[members]
            yield one_solver(kernels, mode.roots, own, mode.alpha, place)

    def sample(self, n: int, generator: torch.Generator, prior_precision: Tensor) -> list[Tensor]:
        """Raises ValueError: the refitted mean is one of functions, there are no weights that have it."""
        raise ValueError("Rows(refit=True) has no weights to sample around: fit with Rows()")

    def sample_span(self, n: int, generator: torch.Generator, prior_precision: Tensor) -> list[Tensor]:
        """Raises ValueError, as `sample`."""
        return self.sample(n, generator, prior_precision)

    def damaged(self) -> list[int]:
        observed, layout = self.observed, self.roots.layout
        shapes = [tuple(rows.shape) for rows in layout.rows]
        sound = [tuple(each.shape) for each in observed.prior] == shapes
        sound = sound and [len(each) for each in observed.targets] == [shape[0] for shape in shapes]
        return super().damaged() if sound and all(x.isfinite().all() for x in observed.prior) else self._all()

    def tensors(self) -> dict[str, Tensor]:
        observed = self.observed
        parts = {"prior": observed.prior, "targets": observed.targets}
        return super().tensors() | {
            f"{part}.{size}": tensor
            for part, each in parts.items()
            for size, tensor in zip(self._block_sizes, each, strict=True)
        }

    @classmethod
    def refitted_from(
        cls, rows: RowCurvature, tensors: dict[str, Tensor], likelihood: Likelihood
    ) -> RefittedCurvature:
        """Of the rows and what `tensors` gave. Raises KeyError for a missing tensor."""
        home, layout = rows.home, rows.roots.layout
        prior, targets = (
            [tensors[f"{part}.{size}"].to(home) for size in layout.block_sizes]
            for part in ("prior", "targets")
        )
        return cls(rows, Observations(layout, likelihood, prior, targets))
