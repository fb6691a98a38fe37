"""The linearised model refitted under its prior, in row space.

A trained adapter is not the optimum of the objective that the Laplace posterior is built on: it was trained without
that prior, and for too long or too briefly. The linearised model's own optimum under the prior is an R x R problem
(Immer, Korzepa and Bauer 2021, "Improving predictions of Bayesian neural nets via local linearization"). As a Gaussian
process over the training outputs (Rasmussen and Williams 2006, sections 3.4 and 3.5):

    f = m + K alpha        K = J Lambda^-1 J^T, m the functions with the adapter switched off, at the prior mean
    alpha = d/df log p(y | f),  W = S S^T = -d2/df2 log p(y | f) at the optimum
    evidence = log p(y | f) - alpha^T K alpha / 2 - logdet(I + S^T K S) / 2

The optimum is found in refits/mode.py, its leave-one-out predictions in refits/left_out.py: by them the prior precision
can be chosen without held-out data and without a model pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from laplace_lora_fast.likelihoods import Likelihood
from laplace_lora_fast.structures.base import Curvature
from laplace_lora_fast.structures.rows.algebra import RowCurvature
from laplace_lora_fast.structures.rows.layout import BlockDiagonal
from laplace_lora_fast.structures.rows.refits.left_out import LeftOut, leave_one_out
from laplace_lora_fast.structures.rows.refits.mode import (
    Mode,
    Observations,
    equivalent_mode,
    log_det_of_shrinkage,
    newton,
)
from laplace_lora_fast.structures.rows.refits.path import ModePath
from laplace_lora_fast.structures.rows.solver import Solver, one_solver
from laplace_lora_fast.structures.search import maximum_on_log_axis

_TOLERANCE = 1e-12  # of modes whose evidences are compared: what is left of a step is in them


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
        """From scratch, so that it does not depend on what was asked before."""
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
        path = ModePath(self, _TOLERANCE)
        return {keys[0]: maximum_on_log_axis(lambda lam: path.mode(lam).log_evidence, 1e-6, 1e8)}

    def maximise_evidence_with_noise(self, keys: Sequence[str]) -> tuple[dict[str, float], float]:
        """The prior precision and the noise s of a Gaussian likelihood, together.

        The evidence is that of y - m ~ N(0, s^2 (I + K / mu)), mu the prior precision times s^2: for each mu the best
        s^2 is q / R, q the quadratic form at unit noise. What is left is a search over mu.
        """
        path = ModePath(self, _TOLERANCE)

        def at(mu: float) -> tuple[float, float]:
            """Evidence at the best noise, and that noise."""
            mode, layout = path.mode(mu), self.observed.layout
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
