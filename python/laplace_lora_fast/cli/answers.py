"""Generated answers on a terminal, as a page, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from laplace_lora_fast.text.result import Generation

_MARKS = "⟦", "⟧"  # seen where there are no colours too
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Answers and their uncertainty</title>
<body style="font-family:sans-serif;max-width:50em;margin:2em auto">
<p>The redder a token, the more {measure} uncertainty.</p>
{answers}
</body></html>
"""


def prompts_of(given: Sequence[str] | None, data: Path | None) -> list[Any]:
    """The prompts of --prompt or of the file --data.

    Raises:
        ValueError: neither, both, or an empty one.
    """
    from laplace_lora_fast.data.prompts import read_prompts

    if bool(given) == (data is not None):
        raise ValueError("pass prompts by --prompt, or a file of them by --data")
    if data is not None:
        return read_prompts(data)
    assert given
    if not all(prompt.strip() for prompt in given):
        raise ValueError("--prompt is empty")
    return list(given)


def check(measure: str, temperature: float | None, top_p: float | None) -> None:
    """Raises ValueError for values that are none of the choices, or have no effect."""
    from laplace_lora_fast.text.result import MEASURES

    if measure not in MEASURES:
        raise ValueError(f"--measure must be {', '.join(MEASURES[:-1])} or {MEASURES[-1]}, got {measure!r}")
    if temperature is not None and temperature <= 0:
        raise ValueError(
            f"--temperature must be positive, got {temperature:g}: leave it out for the likeliest tokens"
        )
    if top_p is not None and temperature is None:
        raise ValueError("--top-p is for drawn tokens: pass --temperature too")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"--top-p must lie in (0, 1], got {top_p:g}")


def show(console: Console, found: Generation, measure: str, above: float) -> None:
    """Prints prompts and answers, tokens above a bound in brackets and red."""

    def mark(piece: str, value: float) -> str:
        if value <= above or not piece:
            return escape(piece)
        return f"[bold red]{_MARKS[0]}{escape(piece)}{_MARKS[1]}[/bold red]"

    assert found.prompts is not None
    scores = found.sequence()
    for row, (prompt, answer) in enumerate(zip(found.prompts, found.marked(mark, measure), strict=True)):
        console.print(f"[dim]{escape(prompt)}[/dim]{answer}", soft_wrap=True, highlight=False)
        numbers = f"epistemic {scores.epistemic[row]:.3f}, total {scores.total[row]:.3f} nats a token"
        console.print(
            f"[dim]{numbers}, {int(scores.length[row])} tokens; marked: {measure} above {above:g}[/dim]\n",
            soft_wrap=True,
            highlight=False,
        )


def page(found: Sequence[Generation], measure: str) -> str:
    """A page of all answers."""
    return _PAGE.format(measure=measure, answers="\n".join(each.html(measure) for each in found))


def json_lines(found: Sequence[Generation], measure: str) -> str:
    """A line an answer; every token has all measures."""
    from laplace_lora_fast.text.result import MEASURES

    lines = []
    for each in found:
        assert each.texts is not None
        assert each.prompts is not None
        assert each.pieces is not None
        scores = each.sequence()
        of_token = {name: getattr(each.uncertainty, name).tolist() for name in MEASURES}
        for row, (prompt, text, pieces) in enumerate(zip(each.prompts, each.texts, each.pieces, strict=True)):
            tokens = [
                {"text": piece} | {name: round(of_token[name][row][place], 6) for name in MEASURES}
                for place, piece in enumerate(pieces)
            ]
            whole = {name: float(getattr(scores, name)[row]) for name in MEASURES}
            lines.append({"prompt": prompt, "answer": text, **whole, "tokens": tokens})
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
