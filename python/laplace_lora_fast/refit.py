"""The linearised model refitted under its prior, in row space, and its leave-one-out predictions.

A trained adapter is not the optimum of the objective that the Laplace posterior is built on: it was trained without
that prior, and for too long or too briefly. The linearised model's own optimum under the prior is an R x R problem
(Immer, Korzepa and Bauer 2021, "Improving predictions of Bayesian neural nets via local linearization"). As a Gaussian
process over the training outputs (Rasmussen and Williams 2006, sections 3.4 and 3.5):

    f = m + K alpha        K = J Lambda^-1 J^T, m the outputs with the adapter switched off, its value at the prior mean
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

from laplace_lora_fast.curvature import BlockName
from laplace_lora_fast.distributed import Ranks
from laplace_lora_fast.dual import DualCurvature, RowAccumulator
from laplace_lora_fast.dual_predictor import Solver, one_solver, times_root, times_transposed_root, whitened
from laplace_lora_fast.errors import InvalidBatchError, NumericalError
from laplace_lora_fast.evidence import maximum_on_log_axis
from laplace_lora_fast.heads import Inputs
from laplace_lora_fast.likelihoods import Categorical, Gaussian
from laplace_lora_fast.taps import Site, Tap

_STEPS = 100  # of Newton's method, which takes about five


@dataclass(frozen=True)
class Mode:
    """The optimum under one prior; all fp64.

    Attributes:
        outputs: f [N, K], contrasts f_c - f_0 of a classification, outputs of a regression.
        alpha: [N, K].
        roots: the blocks of S, [N, K, K].
        log_evidence: of the refitted model.
    """

    outputs: Tensor
    alpha: Tensor
    roots: Tensor
    log_evidence: float


@dataclass(frozen=True)
class Observations:
    """What the linearised model is refitted to.

    Attributes:
        prior_outputs: m [N, K] fp64, contrasts or outputs.
        targets: class indices [N], or reals [N, K].
        precision: of a regression's noise, 1 / sigma^2; 1 for a classification.
    """

    prior_outputs: Tensor
    targets: Tensor
    precision: float = 1.0

    @property
    def is_classification(self) -> bool:
        return not self.targets.is_floating_point()

    def log_likelihood(self, f: Tensor) -> Tensor:
        """Scalar log p(y | f)."""
        if self.is_classification:
            return Categorical().log_likelihood(_logits(f), self.targets)
        normaliser = 0.5 * f.numel() * math.log(2 * math.pi / self.precision)
        return Gaussian().log_likelihood(f, self.targets) * self.precision - normaliser

    def gradient(self, f: Tensor) -> Tensor:
        """d/df log p(y | f), [N, K]."""
        if self.is_classification:
            return -Categorical().residual(_logits(f), self.targets)[:, 1:]
        return -Gaussian().residual(f, self.targets) * self.precision

    def roots(self, f: Tensor) -> Tensor:
        """Blocks of S [N, K, K] with S S^T the negative Hessian in f."""
        if self.is_classification:
            return Categorical().hessian_root(_logits(f))[:, 1:]
        return Gaussian().hessian_root(f) * math.sqrt(self.precision)


def _logits(contrasts: Tensor) -> Tensor:
    return torch.nn.functional.pad(contrasts, (1, 0))


def newton(kernel: Tensor, observed: Observations) -> Mode:
    """The mode of p(f | y) for f ~ N(m, kernel) (Rasmussen and Williams 2006, algorithm 3.3, with step halving).

    Args:
        kernel: K [R, R], fp64.
        observed: prior outputs and targets.

    Raises:
        NumericalError: no convergence.
    """
    prior = observed.prior_outputs
    identity = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)

    def at(alpha: Tensor) -> tuple[Tensor, float]:
        shift = (kernel @ alpha.flatten()).view_as(prior)
        f = prior + shift
        return f, float(observed.log_likelihood(f) - 0.5 * (alpha * shift).sum())

    alpha, last = torch.zeros_like(prior), math.inf
    f, value = at(alpha)
    for _ in range(_STEPS):
        roots = observed.roots(f)
        chol = torch.linalg.cholesky(identity + whitened(kernel, roots))
        shift = (f - prior).flatten()[:, None]
        b = times_root(roots, times_transposed_root(roots, shift)) + observed.gradient(f).flatten()[:, None]
        inner = times_transposed_root(roots, kernel @ b)
        target = (b - times_root(roots, torch.cholesky_solve(inner, chol))).view_as(prior)
        step, tried = 1.0, at(target)
        while tried[1] < value - 1e-12 * (1 + abs(value)) and step > 1e-6:
            step /= 2
            tried = at(alpha + step * (target - alpha))
        moved = float((tried[0] - f).abs().max() / (1 + f.abs().max()))
        alpha, (f, value) = alpha + step * (target - alpha), tried
        # Near the optimum each step is about the square of the last: small means there, as large as the last rounding.
        there, rounding = moved <= 1e-9, last < 1e-5 and moved > last / 2
        last = moved if step == 1 else math.inf
        if there or rounding:
            log_det = 2 * chol.diagonal().log().sum()
            return Mode(f, alpha, observed.roots(f), float(value - 0.5 * log_det))
    raise NumericalError(f"the refit did not converge in {_STEPS} steps: try larger prior precisions")


def leave_one_out(kernel: Tensor, observed: Observations, mode: Mode) -> tuple[Tensor, Tensor]:
    """Mean [N, K] and covariance [N, K, K] of each example's outputs under the data without it.

    Args:
        kernel: K [R, R], fp64.
        observed: prior outputs and targets.
        mode: `newton` of both.
    """
    n, k = mode.outputs.shape
    identity = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    chol = torch.linalg.cholesky(identity + whitened(kernel, mode.roots))
    seen = torch.linalg.solve_triangular(chol, times_transposed_root(mode.roots, kernel), upper=False)
    own = kernel.view(n, k, n, k).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    posterior = own - torch.einsum("rni,rnj->nij", *[seen.view(-1, n, k)] * 2)
    weights = mode.roots @ mode.roots.mT
    cavity = torch.linalg.solve(
        torch.eye(k, dtype=kernel.dtype, device=kernel.device) - posterior @ weights, posterior
    )
    cavity = (cavity + cavity.mT) / 2
    gradient = observed.gradient(mode.outputs)
    return mode.outputs - (cavity @ gradient[..., None]).squeeze(-1), cavity


class RefitAccumulator(RowAccumulator):
    """Keeps, beside the Jacobian rows, what a refit needs: targets, and the outputs with the adapter switched off."""

    def __init__(self, sites: Sequence[Site], sketch_size: int, memory_budget: int, seed: int) -> None:
        super().__init__(sites, sketch_size, memory_budget, seed)
        self._targets: list[Tensor] = []
        self._prior_logits: list[Tensor] = []

    def start_batch(self, tap: Tap, inputs: Inputs, targets: Tensor | None) -> None:
        """Raises InvalidBatchError for a batch without labels."""
        if targets is None:
            raise InvalidBatchError("mean='refit' needs 'labels' in every batch of train_loader")
        self._targets.append(targets)
        self._prior_logits.append(tap.prior_logits(inputs))

    def join(self, ranks: Ranks) -> None:
        super().join(ranks)
        self._targets = [ranks.gather(torch.cat(self._targets))]
        self._prior_logits = [ranks.gather(torch.cat(self._prior_logits))]

    def curvature(self) -> RefittedCurvature:
        dual = super().curvature()
        targets, outputs = torch.cat(self._targets), torch.cat(self._prior_logits).double()
        if not outputs.isfinite().all():
            raise NumericalError("without its adapter the model gives logits that are not finite")
        if targets.is_floating_point():
            targets = targets.double()
        else:
            outputs = outputs[:, 1:] - outputs[:, :1]
        home = dual.rows[0].device
        return RefittedCurvature(dual, Observations(outputs.to(home), targets.to(home)))


class RefittedCurvature(DualCurvature):
    """The curvature of the linearised model at its own optimum, which moves with the prior.

    Args:
        dual: the rows.
        observed: what they are refitted to.
    """

    structure = "dual, refitted"
    refitted = True

    def __init__(self, dual: DualCurvature, observed: Observations) -> None:
        super().__init__(dual.names, dual.means, dual.rows, dual.projections, dual.roots)
        self.observed = observed
        self._latest: tuple[list[float], Mode] | None = None

    def scaled(self, factor: float) -> RefittedCurvature:
        observed = replace(self.observed, precision=self.observed.precision * factor)
        return RefittedCurvature(super().scaled(factor), observed)

    def mode(self, prior_precision: Tensor) -> Mode:
        """The optimum under a prior precision, fp64 [n_blocks]; the latest one is kept."""
        key = prior_precision.tolist()
        if self._latest is None or self._latest[0] != key:
            self._latest = key, newton(self.kernel((1 / prior_precision).tolist()), self.observed)
        return self._latest[1]

    def roots_at(self, prior_precision: Tensor) -> Tensor:
        return self.mode(prior_precision).roots

    def log_marginal_likelihood(
        self, prior_precision: Tensor, log_likelihood: float, penalty: float
    ) -> Tensor:
        """Of the refitted model, which knows its own likelihood and penalty."""
        return torch.tensor(self.mode(prior_precision).log_evidence, dtype=torch.float64)

    def maximise_evidence(self, keys: Sequence[str], squared_norms: Sequence[float]) -> dict[str, float]:
        """A search over one prior precision; ValueError for several."""
        if len(set(keys)) > 1:
            raise ValueError("mean='refit' tunes prior_structure='scalar' only")
        ones = torch.ones(len(keys), dtype=torch.float64)
        return {keys[0]: maximum_on_log_axis(lambda lam: self.mode(lam * ones).log_evidence, 1e-6, 1e8)}

    def leave_one_out(self, prior_precision: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [N, K] and covariance [N, K, K] of each training example's outputs without it, fp64."""
        kernel = self.kernel((1 / prior_precision).tolist())
        return leave_one_out(kernel, self.observed, self.mode(prior_precision))

    def solvers(self, kernels: Tensor, parts: Tensor, precisions: Tensor) -> Iterator[Solver]:
        """A refit and a factorisation a prior."""
        for column in precisions.mT:
            mode = self.mode(column[parts])
            yield one_solver(kernels, mode.roots, column, mode.alpha.flatten())

    def sample(self, n: int, generator: torch.Generator, prior_precision: Tensor) -> list[Tensor]:
        """Raises ValueError: the refitted mean is one of outputs, there are no weights that have it."""
        raise ValueError("mean='refit' has no weights to sample around: fit with mean='map'")

    def damaged(self) -> list[int]:
        outputs, targets = self.observed.prior_outputs, self.observed.targets
        sound = outputs.dim() == 2 and len(outputs) == len(targets) and outputs.numel() == self.n_rows
        return super().damaged() if sound and outputs.isfinite().all() else list(range(len(self.means)))

    def tensors(self) -> dict[str, Tensor]:
        observed = self.observed
        return super().tensors() | {"prior_outputs": observed.prior_outputs, "targets": observed.targets}

    @classmethod
    def from_tensors(
        cls,
        structure: str,
        names: list[BlockName],
        tensors: dict[str, Tensor],
        devices: Sequence[torch.device],
    ) -> RefittedCurvature:
        dual = DualCurvature.from_tensors(structure, names, tensors, devices)
        home = dual.rows[0].device
        return cls(dual, Observations(tensors["prior_outputs"].to(home), tensors["targets"].to(home)))
