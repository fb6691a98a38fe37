"""What was generated, with its uncertainty, for people to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from torch import Tensor

from laplace_lora_fast.options import check_choice
from laplace_lora_fast.sampling.measures import SequenceUncertainty, TokenUncertainty

MEASURES = ("epistemic", "total", "aleatoric", "epkl", "rmi", "nll")


@dataclass(frozen=True)
class Generation:
    """Answers to prompts.

    Attributes:
        uncertainty: of every token of the answers, [N, L].
        texts: of the answers, without special tokens; None where no tokenizer was given.
        pieces: of every answer the text of each token, special ones included; None likewise.
        prompts: texts of the prompts; None likewise.
    """

    uncertainty: TokenUncertainty
    texts: list[str] | None = None
    pieces: list[list[str]] | None = None
    prompts: list[str] | None = None

    @property
    def tokens(self) -> Tensor:
        """[N, L]; what stands behind the end of an answer is nothing."""
        return self.uncertainty.tokens

    @property
    def mask(self) -> Tensor:
        """[N, L], False behind the end of an answer."""
        return self.uncertainty.mask

    def sequence(self, normalised: bool = True) -> SequenceUncertainty:
        """Uncertainty about whole answers: see `TokenUncertainty.sequence`."""
        return self.uncertainty.sequence(normalised)

    def __repr__(self) -> str:
        if self.texts is None:
            return f"Generation(tokens=[{', '.join(map(str, self.tokens.shape))}])"
        scores = self.sequence().epistemic.tolist()
        lines = [
            f"{text!r}  # epistemic {score:.3f} a token"
            for text, score in zip(self.texts, scores, strict=True)
        ]
        return "Generation(" + ",\n           ".join(lines) + ")"

    def marked(self, mark: Callable[[str, float], str], measure: str = "epistemic") -> list[str]:
        """Each answer, token by token as `mark` gives them.

        Args:
            mark: (text of a token, its uncertainty in nats) -> text.
            measure: "epistemic", "total", "aleatoric", "epkl", "rmi" or "nll".

        Raises:
            ValueError: no tokenizer was given, or there is no such measure.
        """
        values = getattr(self.uncertainty, check_choice("measure", measure, MEASURES)).tolist()
        if self.pieces is None:
            raise ValueError("there are tokens only, no text: pass a tokenizer to generate")
        return [
            "".join(mark(piece, value) for piece, value in zip(pieces, row, strict=False))
            for pieces, row in zip(self.pieces, values, strict=True)
        ]

    def html(self, measure: str = "epistemic", full: float = 1.0) -> str:
        """A page's part: prompts and answers, tokens the redder the less certain, with the numbers as tooltips.

        Args:
            measure: as for `marked`.
            full: nats from which on a token is as red as can be.
        """

        def mark(piece: str, value: float) -> str:
            shade = min(max(value / full, 0.0), 1.0)
            shown = escape(piece).replace("\n", "↵\n")
            return f'<span style="background:rgba(220,40,40,{shade:.2f})" title="{measure} {value:.3f}">{shown}</span>'

        answers = self.marked(mark, measure)
        prompts = self.prompts or [""] * len(answers)
        scores = self.sequence()
        parts = []
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            numbers = f"epistemic {scores.epistemic[row]:.3f}, total {scores.total[row]:.3f} nats a token"
            parts.append(
                f'<p style="white-space:pre-wrap">{escape(prompt)}<b>{answer}</b><br><small>{numbers}</small></p>'
            )
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>" if self.pieces is None else self.html()


def pieces_of(tokenizer: Any, prompt: Sequence[int], answer: Sequence[int]) -> list[str]:
    """The text of each token of an answer where it stands: behind the prompt's they are the text of all.

    A token may hold part of a character only: then it is empty, and the one that completes it has it all.
    """
    context = list(prompt[-_CONTEXT:])
    pieces, before = [], tokenizer.decode(context)
    for end in range(1, len(answer) + 1):
        text = tokenizer.decode([*context, *answer[:end]])
        if text.endswith("\ufffd") or not text.startswith(before):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        before = text
    return pieces


_CONTEXT = 8  # tokens of the prompt that an answer's first text may depend on
