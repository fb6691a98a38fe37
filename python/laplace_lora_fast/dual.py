"""The exact GGN in row space: linearised Laplace without a Kronecker approximation, for small data.

With R = N (C - 1) Jacobian rows J (over the weights of all layers together) and the square root S of the likelihood's
Hessian, block diagonal with a [K, K] block an example, H = Phi^T Phi for Phi = S^T J, and all that is asked of
(H + Lambda)^-1 is an R x R problem (the dual, or kernel, form of Bayesian linear regression; Rasmussen and Williams
2006, section 2.1):

    K = Phi Lambda^-1 Phi^T = S^T (J Lambda^-1 J^T) S
    covariance    J* Lambda^-1 J*^T - K*R (I + K)^-1 KR*      K*R = J* Lambda^-1 Phi^T
    evidence      logdet(H + Lambda) - logdet Lambda = logdet(I + K)

J is kept rather than Phi: it does not vanish where the model is certain, and serves any S (see refit.py). It is not
kept whole: of each [r, d] Jacobian, J Omega [r, m] is, with a fixed random orthonormal Omega [d, m] times sqrt(d / m),
one per block. Inner products are then unbiased, and exact for m = d. Test rows use the same Omega, so that the
covariance is one of a Gaussian: never negative.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.curvature import BlockName, Curvature
from laplace_lora_fast.distributed import Ranks
from laplace_lora_fast.dual_predictor import (
    DualPredictor,
    Solver,
    shared_solvers,
    sketched,
    times_root,
    times_transposed_root,
    whitened,
)
from laplace_lora_fast.errors import NumericalError
from laplace_lora_fast.evidence import evidence_root
from laplace_lora_fast.fit import Accumulator
from laplace_lora_fast.jacobians import JacobianObserver
from laplace_lora_fast.likelihoods import contrast_cotangents
from laplace_lora_fast.rows import RowStore
from laplace_lora_fast.taps import Site


def random_projection(dim: int, size: int, seed: int, like: Tensor) -> Tensor:
    """Omega [d, min(m, d)] with orthogonal columns of length sqrt(d / m); the identity for m >= d."""
    dtype = lk.accumulation_dtype(like.dtype)
    if size >= dim:
        return torch.eye(dim, dtype=dtype, device=like.device)
    noise = torch.randn(dim, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    basis: Tensor = torch.linalg.qr(noise).Q.contiguous()
    omega: Tensor = (basis * (dim / size) ** 0.5).to(like.device, dtype)
    return omega


class RowAccumulator(JacobianObserver, Accumulator):
    """Observer that keeps the sketched Jacobian rows of every block, example by example.

    Args:
        sites: the tapped layers.
        sketch_size: m.
        memory_budget: bytes of rows before they leave the device.
        seed: of Omega.
        exact: whether the Fisher information is the exact one: rows are then those of the plain outputs.
    """

    def __init__(
        self, sites: Sequence[Site], sketch_size: int, memory_budget: int, seed: int, exact: bool = True
    ) -> None:
        super().__init__(sites, [None] * (2 * len(sites)))
        self._means = [weight for site in sites for weight in (site.A, site.B.mT)]
        self._projections = [
            random_projection(mean.shape[1], sketch_size, seed + index, mean)
            for index, mean in enumerate(self._means)
        ]
        self._names = [(site.name, side) for site in sites for side in "AB"]
        self._store = RowStore(len(self._names), memory_budget)
        self._batch: list[list[Tensor]] = [[] for _ in self._names]  # [N, r m] a pass
        self._roots: list[Tensor] = []
        self._exact = exact
        self._plain: Tensor | None = None

    def start(self, groups: list[int]) -> None:
        """Takes the grouping of inputs from the first forward pass."""
        self.groups = groups

    def directions(self, fisher: Tensor) -> Tensor:
        """The outputs themselves, or contrasts where the exact Fisher is blind to a shift; else the Fisher's own."""
        n, outputs, passes = fisher.shape
        if not self._exact:
            self._roots.append(torch.eye(passes, dtype=fisher.dtype, device=fisher.device).expand(n, -1, -1))
            return fisher
        self._roots.append(fisher[:, outputs - passes :])
        if self._plain is None:  # made once: the way to the device is long
            plain = torch.eye(outputs) if passes == outputs else contrast_cotangents(outputs)
            self._plain = plain.to(fisher)
        return self._plain.expand(n, -1, -1)

    def observe_jacobian(self, block: int, small: Tensor, large: Tensor) -> None:
        self._batch[block].append(sketched(small, large, self._projections[block]))

    def finish_pass(self, n: int) -> None:
        """A backward pass over n examples is over: blocks it did not reach have zero rows."""
        passes = max(len(rows) for rows in self._batch)
        for rows, mean, projection in zip(self._batch, self._means, self._projections, strict=True):
            if len(rows) < passes:
                rows.append(projection.new_zeros(n, mean.shape[0] * projection.shape[1]))

    def finish_batch(self) -> None:
        """A batch is over: its rows are complete, example by example."""
        for block, rows in enumerate(self._batch):
            self._store.append(block, torch.stack(rows, 1).flatten(0, 1))
            rows.clear()
        self.forget()

    def join(self, ranks: Ranks) -> None:
        """Takes in the rows of all ranks: each then holds them all."""
        if ranks.size > 1:
            self._store = self._store.gathered(ranks)
            self._roots = [ranks.gather(torch.cat(self._roots))]

    def curvature(self) -> DualCurvature:
        """The curvature of all rows.

        Raises:
            NumericalError: a row is not finite; names the layer.
        """
        rows = self._store.matrices()
        for (layer, _), matrix in zip(self._names, rows, strict=True):
            if not matrix.isfinite().all():
                raise NumericalError(f"the Jacobian of layer {layer!r} is not finite: the model overflows")
        means = [mean.clone(memory_format=torch.contiguous_format) for mean in self._means]
        return DualCurvature(self._names, means, rows, self._projections, torch.cat(self._roots))


class DualCurvature(Curvature):
    """H = J^T S S^T J by its rows.

    Args:
        names: of the blocks.
        means: MAP weights [r, d].
        rows: J Omega of every block, [R, r m], R = N K.
        projections: Omega of every block, [d, m].
        roots: the blocks of S, [N, K, K].
    """

    structure = "dual"
    refitted = False

    def __init__(
        self,
        names: list[BlockName],
        means: list[Tensor],
        rows: list[Tensor],
        projections: list[Tensor],
        roots: Tensor,
    ) -> None:
        self.names, self.means, self.rows, self.projections = names, means, rows, projections
        self.roots = roots
        self._latest_solver: tuple[list[float], Solver] | None = None

    @property
    def n_rows(self) -> int:
        """R."""
        return self.rows[0].shape[0]

    def roots_at(self, prior_precision: Tensor) -> Tensor:
        """The blocks of S under a prior, fp64 [N, K, K] beside the rows: the same under all, unless refitted."""
        return self.roots.to(self.rows[0].device, torch.float64)

    def scaled(self, factor: float) -> DualCurvature:
        return DualCurvature(self.names, self.means, self.rows, self.projections, self.roots * factor**0.5)

    def kernel(self, weights: Sequence[float]) -> Tensor:
        """Weighted sum of the blocks' kernels J_b J_b^T, fp64 [R, R]; blocks of weight 0 are not touched."""
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
        return whitened(self.kernel((1 / prior_precision).tolist()), self.roots_at(prior_precision))

    def whitened_spectrum(self, prior_precision: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.linalg.eigvalsh(self.whitened_kernel(prior_precision)).clamp_min(0).cpu()
        return values, torch.ones_like(values)

    def effective_parameters(self, prior_precision: Tensor) -> Tensor:
        roots, kernel = self.roots_at(prior_precision), self.whitened_kernel(prior_precision)
        inverse = torch.linalg.inv(kernel + torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device))
        shares = []
        for rows, weight in zip(self.rows, (1 / prior_precision).tolist(), strict=True):
            phi = times_transposed_root(roots, rows.to(inverse))
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
        kernels = torch.stack([whitened(kernel, roots) for kernel in plain]).cpu()
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

    def predictor(self, sites: Sequence[Site], prior_precisions: Tensor, n_cotangents: int) -> DualPredictor:
        precisions, parts = prior_precisions.unique(dim=0, return_inverse=True)  # [parts, G]
        solvers: Iterable[Solver] = self._solvers(precisions, parts)
        if precisions.shape[1] == 1:  # kept, for the next batch
            key = prior_precisions[:, 0].tolist()
            if self._latest_solver is None or self._latest_solver[0] != key:
                self._latest_solver = key, next(self._solvers(precisions, parts))
            solvers = [self._latest_solver[1]]
        return DualPredictor(
            sites, self.rows, self.projections, parts.tolist(), solvers, n_cotangents, self.refitted
        )

    def _solvers(self, precisions: Tensor, parts: Tensor) -> Iterator[Solver]:
        weights = [[float(other == part) for other in parts] for part in range(len(precisions))]
        yield from self.solvers(torch.stack([self.kernel(each) for each in weights]), parts, precisions)

    def solvers(self, kernels: Tensor, parts: Tensor, precisions: Tensor) -> Iterator[Solver]:
        """One a prior.

        Args:
            kernels: J J^T of every part, [parts, R, R].
            parts: for each block its part.
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
        solved = times_root(roots, torch.cholesky_solve(times_transposed_root(roots, outputs) + noise, chol))
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
        kernel = self.whitened_kernel(prior_precision)
        phi = times_transposed_root(self.roots_at(prior_precision), rows.to(kernel))
        gain = torch.linalg.solve(
            kernel + torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device), phi
        )
        r, d = mean.shape
        weight = float(1 / prior_precision[block])
        cov: Tensor = weight * torch.eye(r * d, dtype=torch.float64) - (weight**2 * phi.mT @ gain).cpu()
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
        sound = self.roots.dim() == 3 and self.roots.shape[:2].numel() == self.n_rows
        return damaged if sound and self.roots.isfinite().all() else list(range(len(self.means)))

    def describe(self) -> list[tuple[int, float]]:
        return [(min(self.n_rows, p.shape[1]), 1.0) for p in self.projections]

    def tensors(self) -> dict[str, Tensor]:
        parts = {"mean": self.means, "rows": self.rows, "projection": self.projections}
        blocks = {
            f"block.{i}.{part}": tensor for part, each in parts.items() for i, tensor in enumerate(each)
        }
        return blocks | {"roots": self.roots}

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
        return cls(names, means, rows, projections, tensors["roots"])
