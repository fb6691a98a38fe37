"""What the command line decides and refuses before any work: its own options, and where it is to write."""

from __future__ import annotations

import math
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laplace_lora_fast.prior.tuning import Tuning
    from laplace_lora_fast.structures import Structure

AUTO = "auto"
MOST_REFIT_ROWS = 2000  # tuning a refit of so many takes 16 to 18 s of a core, and grows with their cube


def structure_of(name: str, options: Mapping[str, Any], refit: bool) -> Structure | str:
    """The structure that the options spell, or "auto".

    Args:
        name: --structure.
        options: field -> what the user gave, None where nothing.
        refit: whether to refit where the user leaves it open.

    Raises:
        ValueError: an option belongs to another structure, or has a wrong value.
    """
    from laplace_lora_fast.structures import Rows, Structure

    if name == AUTO and refit and not _given(options):
        return Rows(refit=True)
    kinds = _by_name(Structure)
    kind = _chosen("--structure", name, options, kinds, also=[AUTO])
    if kind is None:
        return AUTO
    values = _given(options)
    if refit and "refit" in _fields(kind):
        values.setdefault("refit", True)
    structure: Structure = kind(**values)
    return structure


def names_matching(option: str, pattern: str | None, word: str) -> str | Callable[[str], bool] | None:
    """What `layers` and `trained` take: a word of theirs, or whether a whole name matches a regular expression.

    Raises:
        ValueError: the pattern is no regular expression.
    """
    if pattern in (None, word):
        return pattern
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{option} is no regular expression: {error}") from error
    return lambda name: compiled.fullmatch(name) is not None


def may_refit(structure: str, options: Mapping[str, Any]) -> bool:
    """Whether a structure with these options can refit: the evidence can then be trusted with the prior precision."""
    from laplace_lora_fast.structures import Structure

    if structure == AUTO:
        return not _given(options)
    kind = _by_name(Structure).get(structure)
    exact = options.get("fisher") in (None, "exact")
    return kind is not None and "refit" in _fields(kind) and options.get("refit") is not False and exact


def prior_by_default(held_out: bool, refit: bool) -> str:
    """What chooses the prior precision where the user leaves it open: held-out rows, or the evidence.

    Args:
        held_out: Whether there are held-out rows.
        refit: Whether the model is, or may be, refitted.

    Warns:
        LaplaceWarning: The evidence of a model that is not refitted is left to choose.
    """
    from laplace_lora_fast import LaplaceWarning

    if held_out:
        return "held_out"
    if not refit:
        warnings.warn(
            "without held-out rows the evidence chooses the prior precision, a poor guide on an over-trained adapter "
            "that is not refitted: pass --val or, for small data, --structure rows --refit",
            LaplaceWarning,
            stacklevel=2,
        )
    return "evidence"


def tuning_of(prior: str, options: Mapping[str, Any]) -> Tuning | float:
    """The way of tuning that --prior names, or the number that it is.

    Args:
        prior: --prior.
        options: field -> what the user gave, None where nothing; "loader" stands for --val.

    Raises:
        ValueError: --prior is neither, or an option belongs to another way of tuning, or has a wrong value.
    """
    from laplace_lora_fast import Evidence, HeldOut, LeaveOneOut  # noqa: F401  which registers them
    from laplace_lora_fast.prior.tuning import Tuning

    kinds = _by_name(Tuning)
    try:
        precision = float(prior)
    except ValueError:
        kind = _chosen("--prior", prior, options, kinds, also=["a number"])
        if "loader" in _fields(kind) and options.get("loader") is None:
            raise ValueError(f"--prior {prior} needs --val") from None
        tuning: Tuning = kind(**_given(options))
        return tuning
    if not 0 < precision < math.inf:
        raise ValueError(f"--prior must be positive and finite, got {prior}")
    for option in _given(options):
        raise ValueError(_belongs("--prior", prior, option, kinds))
    return precision


def check_pair(tuning: Tuning, structure: Structure | str) -> None:
    """Raises ValueError where a way of tuning does not go with a structure."""
    from laplace_lora_fast import Evidence, LeaveOneOut
    from laplace_lora_fast.structures import Structure
    from laplace_lora_fast.structures.base import Ability

    can_leave_out = isinstance(structure, Structure) and Ability.LEAVE_ONE_OUT in structure.abilities
    if isinstance(tuning, LeaveOneOut) and not can_leave_out:
        raise ValueError("--prior leave_one_out needs --structure rows --refit")
    if isinstance(tuning, Evidence) and can_leave_out and tuning.per != "all":
        raise ValueError(f"--per must be all with --prior evidence and --refit, got {tuning.per!r}")


def spread(ends: tuple[float, float] | None) -> Sequence[float] | None:
    """The prior precisions to try from one end to the other, ten a decade; None without ends."""
    if ends is None:
        return None
    low, high = ends
    if not 0 < low < high < math.inf:
        raise ValueError(f"--grid must be two ascending positive numbers, got {low:g} {high:g}")
    steps = max(1, round(10 * math.log10(high / low)))
    return [low * (high / low) ** (step / steps) for step in range(steps + 1)]


def check_link(link_approx: str) -> None:
    """Raises ValueError unless it is one of the links."""
    from laplace_lora_fast.likelihoods import Categorical
    from laplace_lora_fast.prediction import MAP_LINK

    names = [*Categorical().links, MAP_LINK]
    if link_approx not in names:
        raise ValueError(f"--link-approx must be {_either(names)}, got {link_approx!r}")


def check_kind_of_rows(texts: bool, score: str | None, samples: int | None) -> None:
    """Raises ValueError for a wrong score of `Options`, or an option that is for the other kind of rows."""
    if score not in (None, "sum", "mean"):
        raise ValueError(f"--score must be sum or mean, got {score!r}")
    if texts and score is not None:
        raise ValueError("--score is for rows with choices, not for texts")
    if not texts and samples is not None:
        raise ValueError("--samples is for texts, {'prompt', 'completion'}, not for rows with choices")


def prior_of_texts(prior: str | None, held_out: bool) -> str:
    """What chooses the prior precision of a posterior of texts: held-out ones, or the user.

    Raises:
        ValueError: neither does: their log-determinant comes from drawn labels, and there is no evidence.
    """
    chosen = "held_out" if prior is None and held_out else prior
    if chosen in (None, "evidence", "leave_one_out"):
        raise ValueError(
            "of texts there is no evidence and no leaving one out: pass --val, or --prior and a number"
        )
    return chosen


def conformal_options(
    calibrated: bool, coverage: float, alpha: float | None, method: str | None
) -> tuple[float, str]:
    """Alpha and method of conformal sets, by default where left open.

    Raises:
        ValueError: a value is wrong, or would not be looked at.
    """
    from laplace_lora_fast.evaluation.selective import METHODS

    for name, value in (("alpha", alpha), ("method", method)):
        if value is not None and not calibrated:
            raise ValueError(f"--{name} is for conformal sets: pass --calibration too")
    if not 0 < coverage <= 1:
        raise ValueError(f"--coverage must lie in (0, 1], got {coverage:g}")
    if alpha is not None and not 0 < alpha < 1:
        raise ValueError(f"--alpha must lie in (0, 1), got {alpha:g}")
    if method is not None and method not in METHODS:
        raise ValueError(f"--method must be {_either(METHODS)}, got {method!r}")
    return 0.1 if alpha is None else alpha, METHODS[0] if method is None else method


def inputs_of(model: str, *places: Path) -> list[Path]:
    """The files that a command reads: those it is given, and what matters of folders."""
    files = []
    for place in (Path(model), *places):
        parts = [*place.glob("*.safetensors"), *place.glob("*config.json")]
        files += parts if place.is_dir() else [place]
    return files


def make_writable(folder: Path) -> None:
    """Makes the folder; raises OSError, before the work and not after it, if nothing can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_output(option: str, out: Path, inputs: Iterable[Path]) -> None:
    """Makes the folder of a file to write. Raises ValueError if the file is one of those that are read."""
    for path in inputs:
        if out.exists() and path.exists() and out.samefile(path):
            raise ValueError(f"{option} {out} would overwrite what is read: choose another file")
    if out.is_dir():
        raise ValueError(f"{option} {out} is a folder: pass a file")
    make_writable(out.parent)


def one_line(error: BaseException) -> str:
    """The first line of a message, enough to act on; with the next ones where it only announces them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    shown = next((n for n, line in enumerate(lines[:3], 1) if not line.endswith((":", ","))), 3)
    return " ".join(lines[:shown])


def _chosen(
    option: str, name: str, options: Mapping[str, Any], kinds: Mapping[str, type], also: Sequence[str]
) -> Any:
    """The class that a short name stands for, None for one of `also`; ValueError for options that it has not."""
    if name not in kinds and name not in also:
        raise ValueError(f"{option} must be {_either([*also, *kinds])}, got {name!r}")
    kind: Any = kinds.get(name)
    for each in _given(options):
        if kind is None or each not in _fields(kind):
            raise ValueError(_belongs(option, name, each, kinds))
    return kind


def _belongs(option: str, name: str, field: str, kinds: Mapping[str, type]) -> str:
    flag = "--val" if field == "loader" else f"--{field}"
    owners = [short for short, kind in kinds.items() if field in _fields(kind)]
    return f"{flag} is an option of {option} {_either(owners)}, not of {option} {name}"


def _by_name(base: type[Any]) -> dict[str, type]:
    from laplace_lora_fast.options import kinds, short_name

    by_name = {short_name(kind): kind for kind in kinds(base)}
    return {name: by_name[name] for name in sorted(by_name)}


def _fields(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _either(names: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def shown(prior_precision: Any) -> str:
    """A prior precision as a person would read it."""
    if isinstance(prior_precision, float):
        return f"{prior_precision:.4g}"
    if len(prior_precision) > 2:
        return f"{min(prior_precision.values()):.4g} to {max(prior_precision.values()):.4g} by layer"
    return ", ".join(f"{key}: {value:.4g}" for key, value in prior_precision.items())
