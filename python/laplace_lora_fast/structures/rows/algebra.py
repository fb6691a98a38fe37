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
covariance is one of a Gaussian: never negative. That sketches are over-confident is undone by the precision they are
used with (precisions/equivalent.py): wherever Lambda stands here, sketched rows take its deterministic equivalent, and
whole ones the prior's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.devices import brought
from laplace_lora_fast.structures.base import Curvature
from laplace_lora_fast.structures.rows.kernels import RowKernels
from laplace_lora_fast.structures.rows.layout import BlockDiagonal, Layout
from laplace_lora_fast.structures.rows.precisions.equivalent import Equivalent
from laplace_lora_fast.structures.rows.precisions.evidence import maximise_evidence, noise_of_mixed
from laplace_lora_fast.structures.rows.precisions.lines import Line, along, lines, on_a_line
from laplace_lora_fast.structures.rows.precisions.parts import SketchedPart
from laplace_lora_fast.structures.rows.solver import Solver, one_solver, shared_solvers
from laplace_lora_fast.structures.search import noise_root
from laplace_lora_fast.weights import WeightName, stored_covariance


class RowCurvature(Curvature):
    """H = J^T S S^T J by its rows.

    Args:
        names: of the weights.
        means: their MAP values [r, d].
        rows: J Omega of every weight, [R, r m].
        projections: Omega of every weight, [d, m].
        roots: S.
        kernels: inner products of the rows, where they are known.
    """

    refitted = False

    def __init__(
        self,
        names: list[WeightName],
        means: list[Tensor],
        rows: list[Tensor],
        projections: list[Tensor],
        roots: BlockDiagonal,
        kernels: RowKernels | None = None,
    ) -> None:
        self.names, self.means, self.rows, self.projections = names, means, rows, projections
        self.roots = roots
        self.kernels = RowKernels(rows, projections) if kernels is None else kernels
        self._latest_solver: tuple[list[float], Solver] | None = None
        self._latest_sketch: tuple[list[float], SketchedPart, Equivalent] | None = None

    @property
    def n_rows(self) -> int:
        """R."""
        return self.rows[0].shape[0]

    @property
    def home(self) -> torch.device:
        """Where R x R matrices are: on the model's device, wherever the rows live."""
        return self.means[0].device

    def _brought(self) -> Iterator[Tensor]:
        """Rows of every weight, [R, r m] in fp64 beside the weight."""
        for rows in brought(self.rows, [mean.device for mean in self.means]):
            yield rows.double()

    def roots_at(self, prior_precision: Tensor) -> BlockDiagonal:
        """S under a prior, fp64 at home: the same under all, unless refitted."""
        return self.roots.to(self.means[0])

    def scaled(self, factor: float) -> RowCurvature:
        roots = self.roots.scaled(factor**0.5)
        return RowCurvature(self.names, self.means, self.rows, self.projections, roots, self.kernels)

    def whitened_kernel(self, prior_precision: Tensor) -> Tensor:
        """S^T J Lambda'^-1 J^T S, fp64 [R, R], Lambda' what the sketch takes in the place of Lambda."""
        weights = (1 / self.effective(prior_precision)).tolist()
        return self.roots_at(prior_precision).whiten(self.kernels.total(weights))

    def effective(self, prior_precision: Tensor) -> Tensor:
        """Lambda' [n_weights]: the prior precision itself where nothing is sketched (see precisions/equivalent.py)."""
        if not self.kernels.sketched:
            return prior_precision
        equivalent, scale = self.equivalent(prior_precision)
        shrinkage = float(equivalent.shrinkage(torch.tensor([scale], dtype=torch.float64)))
        return prior_precision * self.kernels.factors(shrinkage)

    def equivalent(self, prior_precision: Tensor) -> tuple[Equivalent, float]:
        """The equivalent of the sketched part, and the scale of this prior precision in it."""
        _, equivalent, scale = self._sketch(prior_precision)
        return equivalent, scale

    def _sketch(self, prior_precision: Tensor) -> tuple[SketchedPart, Equivalent, float]:
        """The latest is kept."""
        mixed = self.kernels.mixed  # then each prior has its own coordinates
        direction, scale = (prior_precision, 1.0) if mixed else on_a_line(prior_precision)
        key = direction.tolist()
        if self._latest_sketch is None or self._latest_sketch[0] != key:
            part = SketchedPart(self.kernels, self.roots_of_equivalent(), direction)
            self._latest_sketch = key, part, part.equivalent()
        return *self._latest_sketch[1:], scale

    def estimated_error(self, prior_precision: Tensor) -> float:
        """The relative error of variances that is left, nan where there are too few columns to tell.

        How far a half of the columns, corrected by its own halves, is from all of them, judged by the training rows'
        mean variance under the others, about d / (R - d) at an effective dimension d. Where what is left is in inverse
        proportion to the number of columns (MiniLM, SmolLM2), the whole rows are as far again; where it falls with its
        square (random features), they are a quarter as far.
        """
        if self.kernels.fewest_columns < 4:
            return math.nan
        part, equivalent, scale = self._sketch(prior_precision)
        scales = torch.tensor([scale], dtype=torch.float64)
        by_half, by_all = (float(each.dimension(scales)) for each in (part.smaller(), equivalent))
        return by_half / (self.n_rows - by_half) * (self.n_rows - by_all) / by_all - 1

    def notes(self, prior_precision: Tensor) -> list[str]:
        if not self.kernels.sketched:
            return []
        factor = float((self.effective(prior_precision) / prior_precision).min())
        error = self.estimated_error(prior_precision)
        left = "unknown, of so few columns"
        if not math.isnan(error):
            left = f"between {25 * error:+.1f} and {100 * error:+.1f} %"
        return [
            f"sketched rows take {factor:.3f} times the prior precision in its place (their deterministic equivalent); "
            f"estimated error of variances {left}"
        ]

    def roots_of_equivalent(self) -> BlockDiagonal:
        """S under which the sketch is judged."""
        return self.roots.to(self.means[0])

    def whitened_spectrum(self, prior_precision: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.linalg.eigvalsh(self.whitened_kernel(prior_precision)).clamp_min(0).cpu()
        return values, torch.ones_like(values)

    def log_det_ratio(self, prior_precision: Tensor) -> Tensor:
        if not self.kernels.sketched:
            return super().log_det_ratio(prior_precision)
        part, equivalent, scale = self._sketch(prior_precision)
        return part.log_det + equivalent.log_det(scale)

    def effective_parameters(self, prior_precision: Tensor) -> Tensor:
        roots, kernel = self.roots_at(prior_precision), self.whitened_kernel(prior_precision)
        inverse = torch.linalg.inv(kernel + torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device))
        shares = []
        weights = (1 / self.effective(prior_precision)).tolist()
        for rows, weight in zip(self._brought(), weights, strict=True):
            phi = roots.transposed_times(rows.to(inverse))
            shares.append(weight * (phi * (inverse @ phi)).sum())
        return torch.stack(shares).cpu()

    def maximise_evidence(self, keys: Sequence[str], squared_norms: Sequence[float]) -> dict[str, float]:
        return maximise_evidence(self, keys, squared_norms)

    def best_noise(self, prior_precision: Tensor, residuals: float, count: int) -> float:
        if not self.kernels.sketched:
            return super().best_noise(prior_precision, residuals, count)
        if self.kernels.mixed:
            return noise_of_mixed(self, prior_precision, residuals, count)
        equivalent, scale = self.equivalent(prior_precision)
        return noise_root(lambda variance: equivalent.dimension_and_slope(scale * variance), residuals, count)

    def solvers_of(self, prior_precisions: Tensor) -> tuple[list[int], Iterable[Solver]]:
        """For each weight its part, and a solver for each of G priors [n_weights, G]; that of a single one is kept.

        Weights in one part have the same prior precision under each of the priors, and are all sketched or all whole.
        Solvers say whose they are.
        """
        apart = self.kernels.are_sketched if self.kernels.mixed else [False] * len(self.names)
        kinds = torch.tensor(apart, dtype=torch.float64)[:, None]
        precisions, parts = torch.cat([kinds, prior_precisions], 1).unique(dim=0, return_inverse=True)
        precisions = precisions[:, 1:]  # [parts, G]
        solvers: Iterable[Solver] = self._solvers(precisions, parts)
        if precisions.shape[1] == 1:  # kept, for the next batch
            key = prior_precisions[:, 0].tolist()
            if self._latest_solver is None or self._latest_solver[0] != key:
                self._latest_solver = key, next(self._solvers(precisions, parts))
            solvers = [self._latest_solver[1]]
        return parts.tolist(), solvers

    def _solvers(self, precisions: Tensor, parts: Tensor) -> Iterator[Solver]:
        weights = [[float(other == part) for other in parts] for part in range(len(precisions))]
        totals = [self.kernels.total(each) for each in weights]
        kernels = totals[0][None] if len(totals) == 1 else torch.stack(totals)  # one is not copied
        yield from self.solvers(kernels, parts, precisions)

    def solvers(self, kernels: Tensor, parts: Tensor, precisions: Tensor) -> Iterator[Solver]:
        """One a prior.

        Args:
            kernels: J J^T of every part, [parts, R, R].
            parts: for each weight its part.
            precisions: fp64 [parts, G].
        """
        roots = self.roots_at(precisions[parts, 0])
        if not self.kernels.sketched:
            yield from shared_solvers(kernels, roots, precisions)
            return
        for line in lines(precisions):
            yield from self._solvers_on(line, kernels, parts, roots)

    def _solvers_on(
        self, line: Line, kernels: Tensor, parts: Tensor, roots: BlockDiagonal
    ) -> Iterator[Solver]:
        """Of priors that differ in scale alone: one eigenbasis where all is sketched, as the equivalents do so too."""
        direction = line.direction
        if self.kernels.mixed or len(line.places) == 1:
            whole = direction[parts]
            factors = along(
                line.scales, lambda scale: float((self.effective(scale * whole) / scale / whole).min())
            )
            members = [parts.tolist().index(part) for part in range(len(kernels))]
            for place, scale, factor in zip(line.places, line.scales.tolist(), factors.tolist(), strict=True):
                column = scale * direction * self.kernels.factors(1 - factor)[members]
                yield one_solver(kernels, roots, column, prior=place)
            return
        weights = (1 / direction).to(kernels.device)
        kernel = roots.whiten(torch.einsum("p,pij->ij", weights, kernels))
        values, vectors = torch.linalg.eigh(kernel)
        values = values.clamp_min(0)
        equivalent = SketchedPart(self.kernels, roots, direction[parts]).equivalent(values)
        shrinkages = equivalent.shrinkage(line.scales)
        basis = roots.times(vectors)
        for place, scale in zip(line.places, (line.scales * (1 - shrinkages.cpu())).tolist(), strict=True):
            yield Solver(weights / scale, basis, values / scale, prior=place)

    def sample(self, n: int, generator: torch.Generator, prior_precision: Tensor) -> list[Tensor]:
        """Matheron's rule: w = w0 - Lambda^-1 Phi^T (I + K)^-1 (Phi w0 + e), w0 from the prior, e white.

        In the sketched features, w = Omega u: J w then has exactly the predictive's covariance for every J. For m = d
        this is the posterior itself; for m < d the directions outside Omega stay at the MAP value.
        """
        weights = (1 / self.effective(prior_precision)).tolist()
        priors = []
        for mean, rows, weight in zip(self.means, self.rows, weights, strict=True):
            noise = torch.randn((n, rows.shape[1]), generator=generator, dtype=torch.float64).to(mean.device)
            priors.append(noise * weight**0.5)
        home = self.home
        outputs = torch.zeros(self.n_rows, n, dtype=torch.float64, device=home)
        for rows, prior in zip(self._brought(), priors, strict=True):
            outputs += (rows @ prior.mT).to(home)
        roots = self.roots_at(prior_precision)
        noise = torch.randn((self.n_rows, n), generator=generator, dtype=torch.float64).to(home)
        kernel = self.whitened_kernel(prior_precision)
        chol = torch.linalg.cholesky(kernel + torch.eye(len(kernel), dtype=kernel.dtype, device=home))
        solved = roots.times(torch.cholesky_solve(roots.transposed_times(outputs) + noise, chol))
        features = [
            prior - weight * (rows.mT @ solved.to(rows.device)).mT
            for rows, prior, weight in zip(self._brought(), priors, weights, strict=True)
        ]
        return self._moved(features)

    def sample_span(self, n: int, generator: torch.Generator, prior_precision: Tensor) -> list[Tensor]:
        """Steps Lambda^-1/2 U z, U an orthonormal basis of the rows' span and z ~ N(0, (I + U^T H~ U)^-1).

        H~ is the whitened curvature. Functions of the training examples vary as under the whole posterior, as J has no
        part outside the span; those of other inputs vary less.
        """
        weights = (1 / self.effective(prior_precision)).tolist()
        values, vectors = torch.linalg.eigh(self.kernels.total(weights))
        real = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        values, vectors = values[real], vectors[:, real]
        inner = self.roots_at(prior_precision).transposed_times(vectors * values.sqrt())
        unit = torch.eye(len(values), dtype=values.dtype, device=values.device)
        chol = torch.linalg.cholesky(unit + inner.mT @ inner)
        noise = torch.randn((len(values), n), generator=generator, dtype=torch.float64).to(values.device)
        z = torch.linalg.solve_triangular(chol.mT, noise, upper=True)
        combined = vectors @ (z / values.sqrt()[:, None])  # of rows
        features = [
            weight * (rows.mT @ combined.to(rows.device)).mT
            for rows, weight in zip(self._brought(), weights, strict=True)
        ]
        return self._moved(features)

    def _moved(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The weights [n, r, d] moved by steps [n, r m] in the sketched features."""
        samples = []
        for mean, step, projection in zip(self.means, features, self.projections, strict=True):
            whole = step.view(len(step), mean.shape[0], -1) @ projection.double().mT
            samples.append(mean + whole.to(lk.accumulation_dtype(mean.dtype)))
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
