"""What the command line decides and refuses before any work: its own options, and where it is to write."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

MOST_REFIT_ROWS = 2000  # "loo" takes about a thousand factorisations of a matrix with that many rows


def prior_and_mean(prior: str | None, mean: str | None, held_out: bool, may_refit: bool) -> tuple[str, str]:
    """What chooses the prior precision and what the posterior is centred on, where the user leaves it open.

    Args:
        prior: --prior.
        mean: --mean.
        held_out: Whether there are held-out rows.
        may_refit: Whether the other options and the number of rows suit mean="refit".

    Warns:
        LaplaceWarning: Only the evidence is left to choose.
    """
    from laplace_lora_fast import LaplaceWarning

    if prior is None:
        if held_out:
            prior = "val_nll"
        elif mean == "refit" or (mean is None and may_refit):
            prior = "loo"
        else:
            prior = "marglik"
            warnings.warn(
                "without held-out rows the evidence chooses the prior precision, a poor guide on an over-trained "
                "adapter: pass --val or, for small data, --mean refit",
                LaplaceWarning,
                stacklevel=2,
            )
    return prior, mean or ("refit" if prior == "loo" else "map")


def fixed_precision(prior: str) -> float | None:
    """The number that --prior gives, or None where it names a method."""
    try:
        precision = float(prior)
    except ValueError:
        if prior not in ("val_nll", "loo", "marglik"):
            raise ValueError(f"--prior must be val_nll, loo, marglik or a number, got {prior!r}") from None
        return None
    if not 0 < precision < math.inf:
        raise ValueError(f"--prior must be positive and finite, got {prior}")
    return precision


def check_prior(prior: str, mean: str, prior_structure: str, held_out: bool) -> None:
    """Refuses options that do not go together. Raises ValueError."""
    if (prior == "val_nll") != held_out:
        raise ValueError("--prior val_nll and --val need each other")
    if prior == "loo" and mean != "refit":
        raise ValueError("--prior loo needs --mean refit")
    allowed = ["scalar"]
    if prior == "val_nll" or mean != "refit":
        allowed.append("ab")
    if prior != "val_nll" and mean != "refit":
        allowed.append("layerwise")
    if prior_structure not in allowed:
        raise ValueError(
            f"--prior-structure must be {' or '.join(allowed)} with --prior {prior} and --mean {mean}, "
            f"got {prior_structure!r}"
        )


def spread(ends: tuple[float, float] | None, prior: str) -> Sequence[float]:
    """The prior precisions to try from one end to the other, ten a decade; the default grid without ends."""
    if ends is None:
        from laplace_lora_fast.validation import DEFAULT_GRID

        return DEFAULT_GRID
    low, high = ends
    if prior not in ("val_nll", "loo"):
        raise ValueError("--grid is for --prior val_nll or loo")
    if not 0 < low < high < math.inf:
        raise ValueError(f"--grid must be two ascending positive numbers, got {low:g} {high:g}")
    steps = max(1, round(10 * math.log10(high / low)))
    return [low * (high / low) ** (step / steps) for step in range(steps + 1)]


def at_the_edge(chosen: float | Mapping[str, float], grid: Sequence[float], mean: str) -> list[str]:
    """What it means, in a line each, that the largest or the smallest prior precision tried was the best."""
    values = chosen.values() if isinstance(chosen, Mapping) else [chosen]
    notes = []
    if grid[-1] in values:
        limit = "the trained adapter" if mean == "map" else "the model without its adapter"
        notes.append(f"The largest prior precision is best: {limit}, with hardly any uncertainty.")
    if grid[0] in values:
        notes.append("The smallest prior precision is best: --grid LOW HIGH can try smaller ones.")
    return notes


def check_link(link_approx: str) -> None:
    """Raises ValueError unless it is one of the links."""
    if link_approx not in ("probit", "mc", "bridge", "map"):
        raise ValueError(f"--link-approx must be probit, mc, bridge or map, got {link_approx!r}")


def make_writable(folder: Path) -> None:
    """Makes the folder; raises OSError, before the work and not after it, if nothing can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def one_line(error: BaseException) -> str:
    """The first line of a message, enough to act on; with the next ones where it only announces them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    shown = next((n for n, line in enumerate(lines[:3], 1) if not line.endswith(":")), 3)
    return " ".join(lines[:shown])
