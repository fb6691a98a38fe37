"""Reliability diagrams and confidence histograms, one row of panels per data set, one column per method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from laplace_lora_fast.evaluation.metrics import ECE_BINS, Judged, bin_by_confidence, bin_of, score
from laplace_lora_fast.evaluation.selective import abstention_curve
from laplace_lora_fast.saving.atomic import replacing

Grid = Mapping[str, Mapping[str, Judged]]  # data set -> method -> predictions

# Okabe and Ito's colours, told apart with every common kind of colour vision.
_BLUE, _VERMILION, _GREY = "#0072B2", "#D55E00", "#5F5F5F"
_PANEL_INCHES = 2.7
_Z95 = 1.959963984540054


def reliability_diagram(grid: Grid, path: str | Path) -> None:
    """Draws accuracy against confidence: points below the diagonal are over-confident.

    A point is a bin of confidence; its area shows how many predictions fell there, its bar is the 95 % Wilson
    interval of the accuracy.

    Args:
        grid: Data set -> method -> predictions. All rows have the same methods.
        path: PNG to write.

    Raises:
        ValueError: The grid is empty or its rows differ in their methods.
    """
    figure, axes = _panels(grid, "confidence", "accuracy")
    for ax, predictions in axes:
        lowest = 1 / predictions.probs.shape[1]
        bins = bin_by_confidence(predictions)
        low, high = wilson_interval(bins.accuracy, bins.count)
        ax.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1, zorder=1)
        ax.vlines(bins.confidence, bins.accuracy, bins.confidence, color=_VERMILION, linewidth=5, alpha=0.35)
        ax.vlines(bins.confidence, low, high, color=_BLUE, linewidth=1.2)
        area = 12 + 300 * bins.count / bins.count.sum()
        ax.scatter(bins.confidence, bins.accuracy, area, _BLUE, edgecolor="white", clip_on=False, zorder=3)
        scores = score(predictions)
        ax.set_title(f"ECE {scores.ece:.3f}   NLL {scores.nll:.3f}", fontsize=9, color=_GREY)
        margin = 0.04 * (1 - lowest)
        ax.set(xlim=(lowest - margin, 1 + margin), ylim=(-0.04, 1.04))
    _key(
        figure,
        [
            Line2D(
                [],
                [],
                color=_BLUE,
                marker="o",
                label="accuracy in a bin, 95 % interval (area: share of predictions)",
            ),
            Patch(color=_VERMILION, alpha=0.35, label="gap to the diagonal"),
        ],
    )
    _save(figure, path)


def confidence_histogram(grid: Grid, path: str | Path) -> None:
    """Draws how confidence is spread over correct and wrong predictions, with its mean beside the accuracy.

    Arguments and errors are those of `reliability_diagram`.
    """
    figure, axes = _panels(grid, "confidence", "predictions")
    centres = [(index + 0.5) / ECE_BINS for index in range(ECE_BINS)]
    for ax, predictions in axes:
        bins, correct = bin_of(predictions.confidence), predictions.correct
        right, wrong = (torch.bincount(bins[some], minlength=ECE_BINS) for some in (correct, ~correct))
        style: dict[str, Any] = {"width": 1 / ECE_BINS, "edgecolor": "white"}
        ax.bar(centres, right.tolist(), color=_BLUE, **style)
        # a second sign besides colour, for grey prints
        ax.bar(centres, wrong.tolist(), bottom=right.tolist(), color=_VERMILION, hatch="////", **style)
        mean, accuracy = predictions.confidence.mean().item(), score(predictions).accuracy
        ax.axvline(mean, color="black", linewidth=1.4)
        ax.axvline(accuracy, color="black", linewidth=1.4, linestyle=":")
        ax.set_title(f"confidence {mean:.3f}   accuracy {accuracy:.3f}", fontsize=9, color=_GREY)
        lowest = 1 / predictions.probs.shape[1]
        ax.set_xlim(math.floor(lowest * ECE_BINS) / ECE_BINS, 1)
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    _key(
        figure,
        [
            Patch(color=_BLUE, label="correct"),
            Patch(facecolor=_VERMILION, edgecolor="white", hatch="////", label="wrong"),
            Line2D([], [], color="black", label="mean confidence"),
            Line2D([], [], color="black", linestyle=":", label="accuracy"),
        ],
    )
    _save(figure, path)


def risk_coverage(grid: Grid, path: str | Path) -> None:
    """Draws the share of errors among the surest predictions, as more of them are answered.

    A band is the 95 % Wilson interval of the risk; the dotted line is that of answering everything. Where predictions
    are equally sure, all of them are answered or none.

    Arguments and errors are those of `reliability_diagram`.
    """
    figure, axes = _panels(grid, "coverage", "risk")
    for ax, predictions in axes:
        curve = abstention_curve(predictions)
        coverage, risk = curve.coverage, curve.risk
        low, high = wilson_interval(risk, coverage * len(predictions.confidence))
        ax.fill_between(coverage, low.clamp_min(0), high, color=_BLUE, alpha=0.2, linewidth=0)
        ax.plot(coverage, risk, color=_BLUE)
        ax.axhline(float(risk[-1]), color=_GREY, linestyle=":", linewidth=1)
        ax.set_title(f"area {curve.area:.3f}", fontsize=9, color=_GREY)
        ax.set(xlim=(0, 1.01), ylim=(0, None))
    _key(figure, [Line2D([], [], color=_BLUE, label="errors among those answered, 95 % interval")])
    _save(figure, path)


def wilson_interval(share: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Wilson's 95 % interval of a binomial proportion (Wilson 1927).

    Args:
        share: Observed proportions, [B].
        count: Trials behind each, [B].

    Returns:
        Lower and upper ends, [B] each.
    """
    n, z2 = count.double(), _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * (share * (1 - share) / n + z2 / (4 * n**2)).sqrt()
    return centre - half, centre + half


def _panels(grid: Grid, x_label: str, y_label: str) -> tuple[Figure, list[tuple[Any, Judged]]]:
    """A figure with labelled panels, and each panel's axes with its predictions."""
    rows = list(grid.values())
    methods = list(rows[0]) if rows else []
    if not methods or any(list(row) != methods for row in rows):
        raise ValueError(
            "a plot needs at least one data set and one method, and the same methods in every row"
        )
    size = (_PANEL_INCHES * len(methods) + 0.6, _PANEL_INCHES * len(rows) + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), len(methods), squeeze=False, sharex=True, sharey="row")
    panels = []
    for (name, row), line in zip(grid.items(), axes, strict=True):
        count = len(row[methods[0]].probs)
        line[0].set_ylabel(f"{name} (n = {count})\n".replace(", ", "\n") + y_label)
        for method, ax in zip(methods, line, strict=True):
            ax.spines[["top", "right"]].set_visible(False)
            panels.append((ax, row[method]))
    for method, top, bottom in zip(methods, axes[0], axes[-1], strict=True):
        top.annotate(
            method,
            (0.5, 1),
            (0, 20),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            weight="bold",
        )
        bottom.set_xlabel(x_label)
    return figure, panels


def _save(figure: Figure, path: str | Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def _key(figure: Figure, handles: list[Any]) -> None:
    """A legend below all panels."""
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
