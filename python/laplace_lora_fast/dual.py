"""The exact GGN in row space: linearised Laplace without a Kronecker approximation, for small data.

With R = N (C - 1) Fisher-weighted Jacobian rows Phi (over the weights of all layers together) H = Phi^T Phi, and all
that is asked of (H + Lambda)^-1 is an R x R problem (the dual, or kernel, form of Bayesian linear regression; Rasmussen
and Williams 2006, section 2.1):

    K = Phi Lambda^-1 Phi^T
    covariance    J* Lambda^-1 J*^T - K*R (I + K)^-1 KR*      K*R = J* Lambda^-1 Phi^T
    evidence      logdet(H + Lambda) - logdet Lambda = logdet(I + K)

Phi is not kept whole: of each [r, d] Jacobian, J Omega [r, m] is, with a fixed random orthonormal Omega [d, m] times
sqrt(d / m), one per block. Inner products are then unbiased, and exact for m = d. Test rows use the same Omega, so that
the covariance is one of a Gaussian: never negative.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.curvature import BlockName, Curvature, Predictor
from laplace_lora_fast.errors import NumericalError
from laplace_lora_fast.evidence import evidence_root
from laplace_lora_fast.heads import Inputs
from laplace_lora_fast.jacobians import JacobianObserver
from laplace_lora_fast.rows import RowStore
from laplace_lora_fast.taps import Site, Tap


def random_projection(dim: int, size: int, seed: int, like: Tensor) -> Tensor:
    """Omega [d, min(m, d)] with orthogonal columns of length sqrt(d / m); the identity for m >= d."""
    dtype = lk.accumulation_dtype(like.dtype)
    if size >= dim:
        return torch.eye(dim, dtype=dtype, device=like.device)
    noise = torch.randn(dim, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(noise).Q.contiguous()
    omega: Tensor = (basis * (dim / size) ** 0.5).to(like.device, dtype)
    return omega


class RowAccumulator(JacobianObserver):
    """Observer that keeps the sketched Jacobian rows of every block, one row per example and cotangent.

    Args:
        sites: the tapped layers.
        sketch_size: m.
        memory_budget: bytes of rows before they leave the device.
        seed: of Omega.
    """

    def __init__(self, sites: Sequence[Site], sketch_size: int, memory_budget: int, seed: int) -> None:
        super().__init__(sites, [None] * (2 * len(sites)))
        self._means = [weight for site in sites for weight in (site.A, site.B.mT)]
        self._projections = [
            random_projection(mean.shape[1], sketch_size, seed + index, mean)
            for index, mean in enumerate(self._means)
        ]
        self._names = [(site.name, side) for site in sites for side in "AB"]
        self._store = RowStore(len(self._names), memory_budget)
        self._reached: set[int] = set()

    def start(self, groups: list[int]) -> None:
        """Takes the grouping of inputs from the first forward pass."""
        self.groups = groups

    def observe_jacobian(self, block: int, small: Tensor, large: Tensor) -> None:
        self._append(block, sketched(small, large, self._projections[block]))

    def finish_pass(self, n: int) -> None:
        """A backward pass over n examples is over: blocks it did not reach have zero rows."""
        for block in set(range(len(self._names))) - self._reached:
            mean, projection = self._means[block], self._projections[block]
            self._append(block, projection.new_zeros(n, mean.shape[0] * projection.shape[1]))
        self._reached.clear()

    def finish_batch(self) -> None:
        """A batch is over."""
        self.forget()

    def curvature(self) -> DualCurvature:
        """The curvature of all rows.

        Raises:
            NumericalError: a row is not finite; names the layer.
        """
        rows = list(self._store.matrices())
        for (layer, _), matrix in zip(self._names, rows, strict=True):
            if not matrix.isfinite().all():
                raise NumericalError(f"the Jacobian of layer {layer!r} is not finite: the model overflows")
        means = [mean.clone(memory_format=torch.contiguous_format) for mean in self._means]
        return DualCurvature(self._names, means, rows, self._projections)

    def _append(self, block: int, rows: Tensor) -> None:
        self._reached.add(block)
        self._store.append(block, rows)


def sketched(small: Tensor, large: Tensor, projection: Tensor) -> Tensor:
    """J Omega of one output of every example, [N, r m]."""
    projected, _ = lk.jacobian_stats(small, large, projection.to(small.dtype), row_grams=False)
    return projected.flatten(1)


class DualCurvature(Curvature):
    """H = Phi^T Phi by its rows.

    Args:
        names: of the blocks.
        means: MAP weights [r, d].
        rows: Phi Omega of every block, [R, r m].
        projections: Omega of every block, [d, m].
    """

    structure = "dual"

    def __init__(
        self, names: list[BlockName], means: list[Tensor], rows: list[Tensor], projections: list[Tensor]
    ) -> None:
        self.names, self.means, self.rows, self.projections = names, means, rows, projections

    @property
    def n_rows(self) -> int:
        """R."""
        return self.rows[0].shape[0]

    def scaled(self, factor: float) -> DualCurvature:
        return DualCurvature(
            self.names, self.means, [rows * factor**0.5 for rows in self.rows], self.projections
        )

    def kernel(self, weights: Sequence[float]) -> Tensor:
        """Weighted sum of the blocks' kernels Phi_b Phi_b^T, fp64 [R, R]; blocks of weight 0 are not touched."""
        home = self.rows[0].device
        kernel = torch.zeros(self.n_rows, self.n_rows, dtype=torch.float64, device=home)
        for rows, weight in zip(self.rows, weights, strict=True):
            if weight != 0:
                lk.gram_(kernel, rows.to(home, torch.float64).mT, alpha=weight)
        return lk.mirror_(kernel)

    def whitened_spectrum(self, prior_precision: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.linalg.eigvalsh(self.kernel((1 / prior_precision).tolist())).clamp_min(0).cpu()
        return values, torch.ones_like(values)

    def effective_parameters(self, prior_precision: Tensor) -> Tensor:
        weights = (1 / prior_precision).tolist()
        kernel = self.kernel(weights)
        inverse = torch.linalg.inv(kernel + torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device))
        shares = []
        for rows, weight in zip(self.rows, weights, strict=True):
            wide = rows.to(inverse)
            shares.append(weight * (wide * (inverse @ wide)).sum())
        return torch.stack(shares).cpu()

    def maximise_evidence(self, keys: Sequence[str], squared_norms: Sequence[float]) -> dict[str, float]:
        """One group: the root of MacKay's condition. Several: L-BFGS on the evidence in log lambda, from that root."""
        groups = list(dict.fromkeys(keys))
        distances = [
            sum(n for n, key in zip(squared_norms, keys, strict=True) if key == group) for group in groups
        ]
        values, counts = self.whitened_spectrum(torch.ones(len(keys), dtype=torch.float64))
        common = evidence_root(values, counts, sum(distances), groups[0] if len(groups) == 1 else "")
        if len(groups) == 1:
            return {groups[0]: common}
        kernels = torch.stack([self.kernel([float(key == group) for key in keys]) for group in groups]).cpu()
        traces = kernels.diagonal(dim1=1, dim2=2).sum(1)
        for group, distance, trace in zip(groups, distances, traces, strict=True):
            evidence_root(trace[None], torch.ones(1), distance, group)  # refuses a group without a maximum
        start = torch.full((len(groups),), common, dtype=torch.float64).log()
        log_lambda: Tensor = start.requires_grad_()
        optimizer = torch.optim.LBFGS(
            [log_lambda],
            max_iter=1000,
            tolerance_grad=1e-9,
            tolerance_change=1e-15,
            line_search_fn="strong_wolfe",
        )
        moved = torch.tensor(distances, dtype=torch.float64)

        def closure() -> Tensor:
            """Negative evidence and its gradient: half of lambda ||theta||^2 + logdet(I + K)."""
            weights = (-log_lambda.detach()).exp()
            kernel = torch.einsum("g,gij->ij", weights, kernels) + torch.eye(self.n_rows, dtype=torch.float64)
            chol = torch.linalg.cholesky(kernel)
            inverse = torch.cholesky_inverse(chol)
            gamma = weights * torch.einsum("ij,gij->g", inverse, kernels)
            log_lambda.grad = 0.5 * (moved / weights - gamma)
            loss: Tensor = 0.5 * ((moved / weights).sum() + 2 * chol.diagonal().log().sum())
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        return dict(zip(groups, log_lambda.detach().exp().tolist(), strict=True))

    def predictor(self, sites: Sequence[Site], prior_precisions: Tensor, n_cotangents: int) -> Predictor:
        return DualPredictor(sites, self, prior_precisions, n_cotangents)

    def sample(self, n: int, generator: torch.Generator, prior_precision: Tensor) -> list[Tensor]:
        """Matheron's rule: w = w0 - Lambda^-1 Phi^T (I + K)^-1 (Phi w0 + e), w0 from the prior, e white.

        In the sketched features, w = Omega u: J w then has exactly the predictive's covariance for every J. For m = d
        this is the posterior itself; for m < d the directions outside Omega stay at the MAP value.
        """
        weights = (1 / prior_precision).tolist()
        priors = []
        for mean, rows, weight in zip(self.means, self.rows, weights, strict=True):
            noise = torch.randn((n, rows.shape[1]), generator=generator, dtype=torch.float64).to(mean.device)
            priors.append(noise * weight**0.5)
        home = self.rows[0].device
        outputs = torch.randn((self.n_rows, n), generator=generator, dtype=torch.float64).to(home)
        for rows, prior in zip(self.rows, priors, strict=True):
            outputs += (rows.double() @ prior.mT).to(home)
        kernel = self.kernel(weights)
        chol = torch.linalg.cholesky(kernel + torch.eye(len(kernel), dtype=kernel.dtype, device=home))
        solved = torch.cholesky_solve(outputs, chol)
        samples = []
        for mean, rows, prior, weight, projection in zip(
            self.means, self.rows, priors, weights, self.projections, strict=True
        ):
            features = prior - weight * (rows.double().mT @ solved.to(rows.device)).mT
            step = features.view(n, mean.shape[0], -1) @ projection.double().mT
            samples.append(mean + step.to(lk.accumulation_dtype(mean.dtype)))
        return samples

    def covariance(self, block: int, prior_precision: Tensor) -> Tensor:
        """Raises ValueError where the block's rows are sketched: its covariance is then not at hand."""
        rows, projection, mean = self.rows[block], self.projections[block], self.means[block]
        if projection.shape[1] < projection.shape[0]:
            raise ValueError(
                f"{self.names[block]} is sketched: fit with sketch_size >= {projection.shape[0]}"
            )
        weights = (1 / prior_precision).tolist()
        kernel = self.kernel(weights)
        gain = torch.linalg.solve(
            kernel + torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device), rows.to(kernel)
        )
        r, d = mean.shape
        weight = weights[block]
        cov: Tensor = (
            weight * torch.eye(r * d, dtype=torch.float64) - (weight**2 * rows.to(kernel).mT @ gain).cpu()
        )
        if self.names[block][1] == "A":
            return cov
        return cov.view(r, d, r, d).permute(1, 0, 3, 2).reshape(r * d, r * d)

    def damaged(self) -> list[int]:
        damaged = []
        for index, (mean, rows, projection) in enumerate(
            zip(self.means, self.rows, self.projections, strict=True)
        ):
            (r, d), m = mean.shape, projection.shape[1]
            fits = rows.shape == (self.n_rows, r * m) and projection.shape[0] == d
            if not (fits and rows.isfinite().all() and projection.isfinite().all()):
                damaged.append(index)
        return damaged

    def describe(self) -> list[tuple[int, float]]:
        return [(min(self.n_rows, p.shape[1]), 1.0) for p in self.projections]

    def tensors(self) -> dict[str, Tensor]:
        parts = {"mean": self.means, "rows": self.rows, "projection": self.projections}
        return {f"block.{i}.{part}": tensor for part, each in parts.items() for i, tensor in enumerate(each)}

    @classmethod
    def from_tensors(
        cls,
        structure: str,
        names: list[BlockName],
        tensors: dict[str, Tensor],
        devices: Sequence[torch.device],
    ) -> DualCurvature:
        means, rows, projections = (
            [tensors[f"block.{index}.{part}"].to(device) for index, device in enumerate(devices)]
            for part in ("mean", "rows", "projection")
        )
        return cls(names, means, rows, projections)


class DualPredictor(JacobianObserver):
    """Covariances J* Lambda^-1 J*^T - K*R (I + K)^-1 KR* under G priors.

    Blocks that have the same prior precision in all of them are summed into one part on the way; rows are read once a
    backward pass.

    Args:
        sites: the tapped layers.
        dual: the training rows.
        prior_precisions: fp64 [n_blocks, G].
        n_cotangents: K.
    """

    def __init__(
        self, sites: Sequence[Site], dual: DualCurvature, prior_precisions: Tensor, n_cotangents: int
    ) -> None:
        super().__init__(sites, [None] * len(dual.names))
        self._dual, self._n_cotangents = dual, n_cotangents
        self._precisions, parts = prior_precisions.unique(dim=0, return_inverse=True)  # [parts, G]
        self._parts: list[int] = parts.tolist()
        kernels = [
            dual.kernel([float(other == part) for other in self._parts])
            for part in range(len(self._precisions))
        ]
        self._solvers = _solvers(torch.stack(kernels), self._precisions)
        self._features: dict[int, list[Tensor]] = {}
        self._cross: Tensor | None = None  # [parts, N, K, R]
        self._own: Tensor | None = None  # [parts, N, K, K]

    def run(self, tap: Tap, inputs: Inputs, cotangents: Tensor) -> tuple[Tensor, Tensor]:
        home, n, k = self._dual.rows[0].device, inputs.batch_size, self._n_cotangents
        sizes = len(self._precisions), n, k
        self._cross = torch.zeros(*sizes, self._dual.n_rows, dtype=torch.float64, device=home)
        self._own = torch.zeros(*sizes, k, dtype=torch.float64, device=home)
        logits = self.sweep(tap, inputs, cotangents)
        cov = torch.stack([solver.covariance(self._own, self._cross) for solver in self._solvers])
        return logits, cov.to(logits.dtype)

    def observe_jacobian(self, block: int, small: Tensor, large: Tensor) -> None:
        waiting = self._features.setdefault(block, [])
        waiting.append(sketched(small, large, self._dual.projections[block]))
        if len(waiting) < self._n_cotangents:
            return
        features = torch.stack(self._features.pop(block), 1).double()  # [N, K, r m]
        assert self._cross is not None
        assert self._own is not None
        part = self._parts[block]
        self._own[part] += (features @ features.mT).to(self._own.device)
        self._cross[part] += (features @ self._dual.rows[block].to(features).mT).to(self._cross.device)

    def forget(self) -> None:
        super().forget()
        self._features.clear()


class _Solver:
    """(I + K)^-1 for one prior, from a factorisation shared with other priors: K = fixed part + last part / lambda."""

    def __init__(self, weights: Tensor, basis: Tensor, values: Tensor) -> None:
        self._weights = weights  # [parts], 1 / lambda
        self._basis = basis  # T [R, R] with (I + K)^-1 = T diag(1 / (1 + values)) T^T
        self._values = values  # [R]

    def covariance(self, own: Tensor, cross: Tensor) -> Tensor:
        """[N, K, K] from the parts' J* J*^T [parts, N, K, K] and J* Phi^T [parts, N, K, R]."""
        prior = torch.einsum("p,pncd->ncd", self._weights, own)
        weighted = torch.einsum("p,pncr->ncr", self._weights, cross) @ self._basis
        return prior - (weighted / (1 + self._values)) @ weighted.mT


def _solvers(kernels: Tensor, precisions: Tensor) -> list[_Solver]:
    """One solver per column of precisions [parts, G]; columns that differ in the last part only share an eigenbasis."""
    identity = torch.eye(kernels.shape[1], dtype=kernels.dtype, device=kernels.device)
    shared: dict[tuple[float, ...], tuple[Tensor, Tensor]] = {}
    solvers = []
    for column in precisions.mT:
        *leading, last = column.tolist()
        key = tuple(leading)
        if key not in shared:
            fixed = identity + sum(kernel / lam for kernel, lam in zip(kernels, leading, strict=False))
            inverse = torch.linalg.solve_triangular(torch.linalg.cholesky(fixed), identity, upper=False)
            values, vectors = torch.linalg.eigh(inverse @ kernels[-1] @ inverse.mT)
            shared[key] = inverse.mT @ vectors, values.clamp_min(0)
        basis, values = shared[key]
        solvers.append(_Solver((1 / column).to(kernels.device), basis, values / last))
    return solvers
