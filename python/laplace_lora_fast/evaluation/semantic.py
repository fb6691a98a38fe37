"""Semantic entropy: how many different things a model's sampled answers say, not how many ways they say it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_lora_fast.options import check_choice

DEFINITIONS = ("kuhn2023", "farquhar2024", "farquhar2024_discrete")


def semantic_entropy(
    clusters: Sequence[int],
    definition: str,
    log_probs: Sequence[float] | Tensor | None = None,
    lengths: Sequence[int] | Tensor | None = None,
) -> float:
    r"""Entropy over the meanings of n sampled answers to one prompt, in nats. Two papers, two quantities.

    With $l_i$ the log probability of answer i and $T_i$ its number of tokens:

    - "kuhn2023" (Kuhn, Gal and Farquhar, ICLR 2023): $p(c) = \sum_{i \in c} e^{l_i}$, not normalised, and
      $-\frac{1}{C} \sum_c \log p(c)$ over the C meanings, a Monte-Carlo integral. Long answers raise it.
    - "farquhar2024" (Farquhar et al., Nature 2024): $p(c) \propto \sum_{i \in c} e^{l_i / T_i}$, normalised over the
      meanings, and $-\sum_c p(c) \log p(c)$.
    - "farquhar2024_discrete" (the same paper, for models that give no probabilities): p(c) is the share of answers.

    Args:
        clusters: the meaning of each answer, any integers: see `entailment_clusters`.
        definition: one of these names; there is no default, as they are not comparable.
        log_probs: $l_i$, sums over the answer's tokens; not for the discrete one. An answer that was drawn twice counts
            twice where it is given twice.
        lengths: $T_i$; for "farquhar2024" only.

    Raises:
        ValueError: an argument is missing, would not be looked at, or has another length.
    """
    check_choice("definition", definition, DEFINITIONS)
    wanted = {"log_probs": definition != DEFINITIONS[2], "lengths": definition == DEFINITIONS[1]}
    given: dict[str, Tensor] = {}
    for name, value in (("log_probs", log_probs), ("lengths", lengths)):
        if (value is not None) != wanted[name]:
            raise ValueError(
                f"{definition} needs {name}" if wanted[name] else f"{definition} takes no {name}"
            )
        if value is not None:
            given[name] = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    _, member = torch.unique(torch.as_tensor(clusters).cpu(), return_inverse=True)
    if member.dim() != 1 or not len(member) or any(each.shape != member.shape for each in given.values()):
        shapes = {name: tuple(each.shape) for name, each in given.items()} | {"clusters": tuple(member.shape)}
        raise ValueError(f"all arguments must hold one value an answer, got {shapes}")
    if "lengths" in given and not (given["lengths"] >= 1).all():
        raise ValueError("lengths must be at least 1")
    of_answer = given.get("log_probs", torch.zeros(len(member), dtype=torch.float64))
    if "lengths" in given:
        of_answer = of_answer / given["lengths"]
    of_meaning = torch.stack([of_answer[member == c].logsumexp(0) for c in range(int(member.max()) + 1)])
    if definition == DEFINITIONS[0]:
        return float(-of_meaning.mean())
    return float(torch.special.entr(of_meaning.softmax(0)).sum())


def entailment_clusters(
    answers: Sequence[str],
    nli: Callable[..., Any],
    *,
    question: str | None = None,
    entailment: str | None = None,
) -> list[int]:
    """Which answers say the same: each entails the other (Kuhn, Gal and Farquhar, ICLR 2023, algorithm 1).

    An answer is compared with the first one of every meaning found so far, in their order, and joins the first that it
    agrees with.

    Args:
        answers: texts.
        nli: a text-classification pipeline of a natural-language-inference model, such as
            `transformers.pipeline("text-classification", model="microsoft/deberta-large-mnli")`, or anything that maps
            a list of {"text", "text_pair"} to as many {"label", "score"}.
        question: stands before both texts, as the papers do.
        entailment: the pipeline's label for it; None for one that begins with "entail".

    Returns:
        The meaning of each answer, counted from 0.

    Raises:
        ValueError: the pipeline gives something else, or labels without a name for entailment.
    """
    texts = [answer if question is None else f"{question} {answer}" for answer in answers]
    first: list[int] = []  # of each meaning
    found: list[int] = []
    for place, text in enumerate(texts):
        pairs = [pair for other in first for pair in ((texts[other], text), (text, texts[other]))]
        entails = _entailed(pairs, nli, entailment)
        same = [
            meaning
            for meaning, other in enumerate(first)
            if texts[other] == text or (entails[2 * meaning] and entails[2 * meaning + 1])
        ]
        if not same:
            first.append(place)
        found.append(same[0] if same else len(first) - 1)
    return found


def _entailed(
    pairs: Sequence[tuple[str, str]], nli: Callable[..., Any], entailment: str | None
) -> list[bool]:
    """Whether the first text of each pair entails the second."""
    if not pairs:
        return []
    results = nli([{"text": one, "text_pair": other} for one, other in pairs])
    try:
        # a pipeline with top_k gives all labels of a pair
        best = [max(r, key=lambda each: each["score"]) if isinstance(r, list) else r for r in results]
        labels = [str(each["label"]) for each in best]
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"nli must give {{'label', 'score'}} for each pair of texts, got {results!r:.200}"
        ) from error
    if len(labels) != len(pairs):
        raise ValueError(f"nli gave {len(labels)} results for {len(pairs)} pairs of texts")
    if entailment is None and any(label.upper().startswith("LABEL_") for label in labels):
        raise ValueError(
            f"nli's labels have no names, {labels[0]!r}: pass entailment=, the one that means it"
        )
    if entailment is not None:
        return [label == entailment for label in labels]
    return [label.lower().startswith("entail") for label in labels]
