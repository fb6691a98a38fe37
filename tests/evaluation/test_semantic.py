"""Semantic entropies against the papers' formulas by hand, and clusters by a stand-in for a pipeline."""

from __future__ import annotations

import math

import pytest
import torch

from laplace_lora_fast.evaluation.semantic import entailment_clusters, semantic_entropy

LOGS = [math.log(0.2), math.log(0.1), math.log(0.3), math.log(0.05)]
LENGTHS = [2, 4, 1, 3]
CLUSTERS = [7, 7, 2, 5]


def test_kuhn_2023() -> None:
    """Masses .3, .3 and .05, not normalised; the mean of their logs."""
    expected = -(2 * math.log(0.3) + math.log(0.05)) / 3
    assert semantic_entropy(CLUSTERS, "kuhn2023", LOGS) == pytest.approx(expected, rel=1e-12)
    doubled = [2 * value for value in LOGS]
    assert semantic_entropy(CLUSTERS, "kuhn2023", doubled) > expected  # longer answers


def test_farquhar_2024() -> None:
    masses = [0.2 ** (1 / 2) + 0.1 ** (1 / 4), 0.3, 0.05 ** (1 / 3)]
    p = [mass / sum(masses) for mass in masses]
    expected = -sum(each * math.log(each) for each in p)
    found = semantic_entropy(CLUSTERS, "farquhar2024", torch.tensor(LOGS, dtype=torch.float64), LENGTHS)
    assert found == pytest.approx(expected, rel=1e-12)
    discrete = semantic_entropy(CLUSTERS, "farquhar2024_discrete")
    assert discrete == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4), rel=1e-12)


def test_one_meaning_has_no_entropy() -> None:
    assert semantic_entropy([3, 3], "farquhar2024", [-5.0, -900.0], [1, 2]) == 0
    assert semantic_entropy([3], "farquhar2024_discrete") == 0
    assert semantic_entropy([0, 1], "kuhn2023", [-2000.0, -4000.0]) == pytest.approx(3000)  # no underflow


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((CLUSTERS, "semantic"), "definition must be one of"),
        ((CLUSTERS, "kuhn2023"), "kuhn2023 needs log_probs"),
        ((CLUSTERS, "kuhn2023", LOGS, LENGTHS), "kuhn2023 takes no lengths"),
        ((CLUSTERS, "farquhar2024", LOGS), "farquhar2024 needs lengths"),
        ((CLUSTERS, "farquhar2024_discrete", LOGS), "takes no log_probs"),
        ((CLUSTERS, "kuhn2023", LOGS[:2]), "one value an answer"),
        (([], "farquhar2024_discrete"), "one value an answer"),
        ((CLUSTERS, "farquhar2024", LOGS, [0, 1, 1, 1]), "lengths must be at least 1"),
    ],
)
def test_wrong_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        semantic_entropy(*arguments)


class Nli:
    """Says that one text entails another where it holds all of its words; keeps what it was asked."""

    def __init__(self, yes: str = "ENTAILMENT", no: str = "neutral", top: bool = False) -> None:
        self.yes, self.no, self.top, self.asked = yes, no, top, []

    def __call__(self, pairs):
        self.asked += [(pair["text"], pair["text_pair"]) for pair in pairs]
        results = []
        for pair in pairs:
            holds = set(pair["text_pair"].split()) <= set(pair["text"].split())
            label, other = (self.yes, self.no) if holds else (self.no, self.yes)
            both = [{"label": other, "score": 0.1}, {"label": label, "score": 0.9}]
            results.append(both if self.top else both[1])
        return results


ANSWERS = ["in Paris", "Paris in", "in Paris France", "Rome", "in Paris", "Rome Rome"]


@pytest.mark.parametrize("top", [False, True])
def test_answers_that_entail_each_other_are_one_meaning(top: bool) -> None:
    """One direction alone is not enough: "in Paris France" says more."""
    assert entailment_clusters(ANSWERS, Nli(top=top)) == [0, 0, 1, 2, 0, 2]


def test_the_question_stands_before_both() -> None:
    nli = Nli()
    assert entailment_clusters(["yes", "no"], nli, question="Is it?") == [0, 1]
    assert nli.asked == [("Is it? yes", "Is it? no"), ("Is it? no", "Is it? yes")]
    assert entailment_clusters([], nli) == []


def test_labels() -> None:
    assert entailment_clusters(ANSWERS, Nli("LABEL_2", "LABEL_0"), entailment="LABEL_2") == [0, 0, 1, 2, 0, 2]
    with pytest.raises(ValueError, match="no names, 'LABEL_"):
        entailment_clusters(ANSWERS, Nli("LABEL_2", "LABEL_0"))
    with pytest.raises(ValueError, match="must give"):
        entailment_clusters(ANSWERS, lambda pairs: [0.5] * len(pairs))
    with pytest.raises(ValueError, match="1 results for 2 pairs"):
        entailment_clusters(ANSWERS, lambda pairs: [{"label": "entailment", "score": 1.0}])
