"""The exact GGN in row space: linearised Laplace without a Kronecker approximation, for small data.

With R Jacobian rows J, one a function of an example, over the weights of all layers together, and the square root S of
the likelihood's Hessian, block diagonal with a [K, K] block an example, H = Phi^T Phi for Phi = S^T J, and all that is
asked of (H + Lambda)^-1 is an R x R problem (the dual, or kernel, form of Bayesian linear regression; Rasmussen and
Williams 2006, section 2.1):

    K = Phi Lambda^-1 Phi^T = S^T (J Lambda^-1 J^T) S
    covariance    J* Lambda^-1 J*^T - K*R (I + K)^-1 KR*      K*R = J* Lambda^-1 Phi^T
    evidence      logdet(H + Lambda) - logdet Lambda = logdet(I + K)

J is kept rather than Phi: it does not vanish where the model is certain, and serves any S (see refit.py). It is not
kept whole: of each [r, d] Jacobian, J Omega [r, m] is, with a fixed random orthonormal Omega [d, m] times sqrt(d / m),
one a weight. Inner products are then unbiased, and exact for m = d. Test rows use the same Omega, so that the
covariance is one of a Gaussian: never negative.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.structures.base import Curvature
from laplace_lora_fast.structures.rows.layout import BlockDiagonal, Layout
from laplace_lora_fast.structures.rows.solver import Solver, shared_solvers
from laplace_lora_fast.structures.search import evidence_root
from laplace_lora_fast.weights import WeightName, stored_covariance


class RowCurvature(Curvature):
    """H = J^T S S^T J by its rows.

    Args:
        names: of the weights.
        means: their MAP values [r, d].
        rows: J Omega of every weight, [R, r m].
        projections: Omega of every weight, [d, m].
        roots: S.
    """

    refitted = False

    def __init__(
        self,
        names: list[WeightName],
        means: list[Tensor],
        rows: list[Tensor],
        projections: list[Tensor],
        roots: BlockDiagonal,
    ) -> None:
        self.names, self.means, self.rows, self.projections = names, means, rows, projections
        self.roots = roots
        self._latest_solver: tuple[list[float], Solver] | None = None

    @property
    def n_rows(self) -> int:
        """R."""
        return self.rows[0].shape[0]

    def roots_at(self, prior_precision: Tensor) -> BlockDiagonal:
        """S under a prior, fp64 beside the rows: the same under all, unless refitted."""
        return self.roots.to(self.rows[0])

    def scaled(self, factor: float) -> RowCurvature:
        return RowCurvature(
            self.names, self.means, self.rows, self.projections, self.roots.scaled(factor**0.5)
        )

    def kernel(self, weights: Sequence[float]) -> Tensor:
        """Weighted sum of the kernels J_w J_w^T of the LoRA weights, fp64 [R, R]; those of weight 0 are not touched."""
        if len(set(weights)) == 1:
            return weights[0] * self._plain_kernel
        return self._sum_of_kernels(weights)

    @cached_property
    def _plain_kernel(self) -> Tensor:
        """Serves every scalar prior."""
        return self._sum_of_kernels([1.0] * len(self.rows))

    def _sum_of_kernels(self, weights: Sequence[float]) -> Tensor:
        home = self.rows[0].device
        kernel = torch.zeros(self.n_rows, self.n_rows, dtype=torch.float64, device=home)
        for rows, weight in zip(self.rows, weights, strict=True):
            if weight != 0:
                lk.gram_(kernel, rows.to(home, torch.float64).mT, alpha=weight)
        return lk.mirror_(kernel)

    def whitened_kernel(self, prior_precision: Tensor) -> Tensor:
        """S^T J Lambda^-1 J^T S, fp64 [R, R]."""
        return self.roots_at(prior_precision).whiten(self.kernel((1 / prior_precision).tolist()))

    def whitened_spectrum(self, prior_precision: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.linalg.eigvalsh(self.whitened_kernel(prior_precision)).clamp_min(0).cpu()
        return values, torch.ones_like(values)

    def effective_parameters(self, prior_precision: Tensor) -> Tensor:
        roots, kernel = self.roots_at(prior_precision), self.whitened_kernel(prior_precision)
        inverse = torch.linalg.inv(kernel + torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device))
        shares = []
        for rows, weight in zip(self.rows, (1 / prior_precision).tolist(), strict=True):
            phi = roots.transposed_times(rows.to(inverse))
            shares.append(weight * (phi * (inverse @ phi)).sum())
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
        roots = self.roots_at(torch.ones(len(keys), dtype=torch.float64))
        plain = [self.kernel([float(key == group) for key in keys]) for group in groups]
        kernels = torch.stack([roots.whiten(kernel) for kernel in plain]).cpu()
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

    def solvers_of(self, prior_precisions: Tensor) -> tuple[list[int], Iterable[Solver]]:
        """For each weight its part, and a solver for each of G priors [n_weights, G]; that of a single one is kept.

        Weights in one part have the same prior precision under each of the priors.
        """
        precisions, parts = prior_precisions.unique(dim=0, return_inverse=True)  # [parts, G]
        solvers: Iterable[Solver] = self._solvers(precisions, parts)
        if precisions.shape[1] == 1:  # kept, for the next batch
            key = prior_precisions[:, 0].tolist()
            if self._latest_solver is None or self._latest_solver[0] != key:
                self._latest_solver = key, next(self._solvers(precisions, parts))
            solvers = [self._latest_solver[1]]
        return parts.tolist(), solvers

    def _solvers(self, precisions: Tensor, parts: Tensor) -> Iterator[Solver]:
        weights = [[float(other == part) for other in parts] for part in range(len(precisions))]
        yield from self.solvers(torch.stack([self.kernel(each) for each in weights]), parts, precisions)

    def solvers(self, kernels: Tensor, parts: Tensor, precisions: Tensor) -> Iterator[Solver]:
        """One a prior.

        Args:
            kernels: J J^T of every part, [parts, R, R].
            parts: for each weight its part.
            precisions: fp64 [parts, G].
        """
        return shared_solvers(kernels, self.roots_at(precisions[parts, 0]), precisions)

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
        outputs = torch.zeros(self.n_rows, n, dtype=torch.float64, device=home)
        for rows, prior in zip(self.rows, priors, strict=True):
            outputs += (rows.double() @ prior.mT).to(home)
        roots = self.roots_at(prior_precision)
        noise = torch.randn((self.n_rows, n), generator=generator, dtype=torch.float64).to(home)
        kernel = self.whitened_kernel(prior_precision)
        chol = torch.linalg.cholesky(kernel + torch.eye(len(kernel), dtype=kernel.dtype, device=home))
        solved = roots.times(torch.cholesky_solve(roots.transposed_times(outputs) + noise, chol))
        samples = []
        for mean, rows, prior, weight, projection in zip(
            self.means, self.rows, priors, weights, self.projections, strict=True
        ):
            features = prior - weight * (rows.double().mT @ solved.to(rows.device)).mT
            step = features.view(n, mean.shape[0], -1) @ projection.double().mT
            samples.append(mean + step.to(lk.accumulation_dtype(mean.dtype)))
        return samples

    def covariance(self, weight: int, prior_precision: Tensor) -> Tensor:
        """Raises ValueError where the weight's rows are sketched: its covariance is then not at hand."""
        rows, projection, mean = self.rows[weight], self.projections[weight], self.means[weight]
        if projection.shape[1] < projection.shape[0]:
            raise ValueError(
                f"the rows of {self.names[weight]} are sketched: fit with Rows(columns={projection.shape[0]})"
            )
        kernel = self.whitened_kernel(prior_precision)
        phi = self.roots_at(prior_precision).transposed_times(rows.to(kernel))
        gain = torch.linalg.solve(
            kernel + torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device), phi
        )
        scale = float(1 / prior_precision[weight])
        unit = torch.eye(mean.numel(), dtype=torch.float64)
        covariance: Tensor = scale * unit - (scale**2 * phi.mT @ gain).cpu()
        return stored_covariance(self.names[weight].side, covariance, tuple(mean.shape))

    def damaged(self) -> list[int]:
        damaged = []
        for index, (mean, rows, projection) in enumerate(
            zip(self.means, self.rows, self.projections, strict=True)
        ):
            (r, d), m = mean.shape, projection.shape[1]
            fits = rows.shape == (self.n_rows, r * m) and projection.shape[0] == d
            if not (fits and rows.isfinite().all() and projection.isfinite().all()):
                damaged.append(index)
        layout, roots = self.roots.layout, self.roots.blocks
        shapes = [(len(rows), size, size) for rows, size in zip(layout.rows, layout.block_sizes, strict=True)]
        sound = layout.n_rows == self.n_rows and [tuple(root.shape) for root in roots] == shapes
        return damaged if sound and all(root.isfinite().all() for root in roots) else self._all()

    def _all(self) -> list[int]:
        return list(range(len(self.means)))

    def describe(self) -> list[dict[str, str]]:
        return [{"columns": f"{p.shape[1]} of {p.shape[0]}"} for p in self.projections]

    def tensors(self) -> dict[str, Tensor]:
        parts = {"mean": self.means, "rows": self.rows, "projection": self.projections}
        tensors = {f"{part}.{i}": tensor for part, each in parts.items() for i, tensor in enumerate(each)}
        roots = {
            f"root.{size}": root for size, root in zip(self._block_sizes, self.roots.blocks, strict=True)
        }
        return tensors | roots | {"sizes": self.roots.layout.sizes}

    @property
    def _block_sizes(self) -> list[int]:
        return self.roots.layout.block_sizes

    @classmethod
    def from_tensors(
        cls, names: list[WeightName], tensors: dict[str, Tensor], devices: Sequence[torch.device]
    ) -> RowCurvature:
        """Of what `tensors` gave, every weight on its device. Raises KeyError for a missing tensor."""
        means, rows, projections = (
            [tensors[f"{part}.{index}"].to(device) for index, device in enumerate(devices)]
            for part in ("mean", "rows", "projection")
        )
        layout = Layout(tensors["sizes"])
        roots = BlockDiagonal(layout, [tensors[f"root.{size}"] for size in layout.block_sizes])
        return RowCurvature(names, means, rows, projections, roots)
