"""The Gaussian posterior over LoRA weights and trained heads, and what it looks like to a person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor

from laplace_lora_fast.model.lora import Treated
from laplace_lora_fast.options import check_choice
from laplace_lora_fast.prior.precision import PriorPrecision
from laplace_lora_fast.structures.base import Curvature
from laplace_lora_fast.weights import SIDES, WeightName, by_layer, is_head, stored

DIRECTIONS = ("all", "data")


@dataclass(frozen=True)
class Posterior:
    """N(theta*, (H + Lambda)^-1).

    Attributes:
        curvature: H and theta*.
        prior_precision: Lambda's diagonal, one value a weight, fp64 [n_weights].
    """

    curvature: Curvature
    prior_precision: Tensor

    def log_det_ratio(self) -> Tensor:
        """logdet(H + Lambda) - logdet Lambda, fp64 scalar."""
        return self.curvature.log_det_ratio(self.prior_precision)

    def effective_parameters(self) -> Tensor:
        """Gamma [n_weights] fp64: how many parameters of each weight the data determine (MacKay 1992)."""
        return self.curvature.effective_parameters(self.prior_precision)

    def covariance(self, layer: str, side: str) -> Tensor:
        """Dense marginal covariance [P, P] fp64 of vec(weight), row-major, of lora_`side` in `layer`.

        The side of a trained head is "head", its weight [W | bias].

        For small layers.

        Raises:
            KeyError: there is no such weight.
        """
        names = self.curvature.names
        if WeightName(layer, side) not in names:
            raise KeyError(
                f"no weight {side!r} in layer {layer!r}; layers: {sorted({name.layer for name in names})}"
            )
        return self.curvature.covariance(names.index(WeightName(layer, side)), self.prior_precision)

    def sample(self, n: int, generator: torch.Generator, directions: str = "all") -> list[Tensor]:
        """Draws n values of every weight, each [n, r, d] as the algebra has it (lora_B transposed).

        Args:
            n: how many.
            generator: on the CPU.
            directions: "all", or "data": the posterior given that nothing moves outside the span of the training data's
                Jacobian rows.

        Raises:
            ValueError: the structure has no such samples.
        """
        check_choice("directions", directions, DIRECTIONS)
        draw = self.curvature.sample if directions == DIRECTIONS[0] else self.curvature.sample_span
        with torch.autocast(self.curvature.means[0].device.type, enabled=False):
            return draw(n, generator, self.prior_precision)


@dataclass(frozen=True)
class WeightFactors:
    """The Kronecker factors of one LoRA weight [out, in]: H = gradient_factor (x) input_factor, vec row-major.

    Attributes:
        gradient_factor: dense [out, out].
        input_factor: dense [in, in].
    """

    gradient_factor: Tensor
    input_factor: Tensor


@dataclass(frozen=True)
class LayerFactors:
    """The factors of one LoRA layer; None of a weight without a posterior."""

    A: WeightFactors | None
    B: WeightFactors | None


@dataclass(frozen=True)
class HeadFactors:
    """The factors of a trained head, its bias being the last column of its weight."""

    head: WeightFactors


def layer_factors(curvature: Curvature, layers: Sequence[Treated]) -> dict[str, LayerFactors | HeadFactors]:
    """Factors by layer name. Raises ValueError for a structure without Kronecker factors."""
    factors: dict[str, LayerFactors | HeadFactors] = {}
    for layer, pairs in zip(layers, by_layer(curvature.dense_factors(), layers), strict=True):
        if is_head(layer):
            factors[layer.name] = HeadFactors(WeightFactors(*pairs[0]))
            continue
        square, of = layer.scaling**2, dict(zip(layer.sides, pairs, strict=True))
        a, b = (of.get(side) for side in SIDES)
        factors[layer.name] = LayerFactors(
            None if a is None else WeightFactors(*a),
            None if b is None else WeightFactors(b[1] * square, b[0] / square),
        )
    return factors


class Summary(str):
    """A table as text, which notebooks show as HTML."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self)}</pre>"


def summarise(
    posterior: Posterior,
    arguments: str,
    prior_precision: PriorPrecision,
    noise: float | None,
    left_alone: Sequence[str],
    structure: str,
    reason: str,
    n_skipped: int = 0,
    untrained: Sequence[str] = (),
    alone: Sequence[str] = (),
) -> Summary:
    """What was done, a table with one row a weight, and lines of totals.

    Args:
        posterior: the posterior.
        arguments: repr of the `LaplaceLoRA`.
        prior_precision: as the user sees it.
        noise: of a regression, or None.
        left_alone: trained parameters outside.
        structure: repr of the structure.
        reason: why it was chosen, where that was left open.
        n_skipped: batches that the fit left out.
        untrained: weights of the adapter that were not trained.
        alone: layers whose rows come from autograd, one sequence at a time.
    """
    curvature = posterior.curvature
    gammas = posterior.effective_parameters().tolist()
    rows = []
    described = zip(curvature.names, curvature.means, curvature.describe(), gammas, strict=True)
    for name, mean, columns, gamma in described:
        shape = tuple(stored(name.side, mean).shape)
        parameters = f"{gamma:.1f} of {mean.numel()}"
        rows.append({"weight": str(name), "shape": str(shape), **columns, "effective parameters": parameters})
    total = sum(mean.numel() for mean in curvature.means)
    lines = [
        arguments,
        f"structure {structure}" + (f" (auto: {reason})" if reason else ""),
        *_table(rows),
        f"{len(gammas)} weights, {sum(gammas):.1f} of {total} parameters determined by the data",
        f"prior precision {prior_precision}" + (f", noise {noise:.4g}" if noise is not None else ""),
        *curvature.notes(posterior.prior_precision),
    ]
    if n_skipped:
        lines.append(f"{n_skipped} batches of the training data were not finite and are left out")
    if alone:
        lines.append(
            f"{len(alone)} layers have no streams of tokens with a row a sequence, so that theirs take a backward pass "
            f"a sequence: {_some(alone)}"
        )
    if untrained:
        lines.append(
            f"{len(untrained)} weights of the adapter were not trained (trained=..) and have no posterior: "
            f"{_some(untrained)}"
        )
    if left_alone:
        lines.append(
            f"{len(left_alone)} trained parameters outside keep their MAP value: {_some(left_alone)}"
        )
    return Summary("\n".join(lines))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _table(rows: Sequence[dict[str, str]]) -> list[str]:
    columns = list(rows[0])
    widths = [max(len(column), *(len(row[column]) for row in rows)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *rest])

    return [line(columns), *(line([row[column] for column in columns]) for row in rows)]
