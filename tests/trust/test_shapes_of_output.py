"""Models whose outputs or labels are of another shape than a classifier's: right, or told what to pass instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from laplace_lora_fast import Classes, InvalidBatchError, LaplaceError, LaplaceLoRA, Outputs, Regression
from laplace_lora_fast.tasks import Task
from tests.matrix import models, oracle

IDS = torch.randint(3, models.VOCAB, (4, 7), generator=torch.Generator().manual_seed(1))
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
CLASSES = torch.tensor([0, 1, 2, 0])


def bert(head: str = "SequenceClassification", num_labels: int = 3, **own: Any) -> Any:
    """A tiny BERT with one of its heads."""
    torch.manual_seed(0)
    config = models.config("bert", is_decoder=False, num_labels=num_labels, **own)
    return models.adapted(getattr(transformers, f"BertFor{head}")(config), ["query", "value"])


def reward() -> Any:
    """A tiny decoder with one logit."""
    torch.manual_seed(0)
    base = transformers.LlamaForSequenceClassification(models.config("llama", num_labels=1))
    return models.adapted(base, ["q_proj"])


def fit(model: Any, task: Task, batch: dict[str, Any]) -> LaplaceLoRA:
    return LaplaceLoRA(model, task, structure=models.EXACT).fit([batch], progress=False)


REFUSED: dict[str, tuple[Callable[[], Any], Task, dict[str, Any]]] = {
    "token classification": (
        lambda: bert("TokenClassification", 5),
        Classes(),
        TEXT | {"labels": torch.zeros(4, 7, dtype=torch.long)},
    ),
    "multi-label": (
        lambda: bert(problem_type="multi_label_classification"),
        Classes(),
        TEXT | {"labels": torch.tensor([[1.0, 0, 1]] * 4)},
    ),
    "multi-label without labels": (lambda: bert(problem_type="multi_label_classification"), Classes(), TEXT),
    "reward model with pairs": (
        reward,
        Classes(),
        {"input_ids_chosen": IDS, "attention_mask_chosen": torch.ones_like(IDS), "input_ids_rejected": IDS},
    ),
    "one logit as a classifier": (reward, Classes(), TEXT | {"labels": torch.tensor([0, 1, 0, 1])}),
    "spans of an answer": (lambda: bert("QuestionAnswering"), Classes(), TEXT | {"labels": CLASSES}),
    "targets under another key": (bert, Classes(), TEXT | {"target": CLASSES}),
    "labels under 'label_ids'": (bert, Classes(), TEXT | {"label_ids": CLASSES}),
    "labels as rows of one 1": (bert, Classes(), TEXT | {"labels": torch.eye(3, dtype=torch.long)[CLASSES]}),
    "labels out of range": (bert, Classes(), TEXT | {"labels": torch.tensor([0, 1, 2, 3])}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_what_to_do(name):
    make, task, batch = REFUSED[name]
    with pytest.raises((LaplaceError, ValueError)) as caught:
        fit(make(), task, batch)
    assert len(str(caught.value)) > 30


def exact(model: Any, outputs: Any, noise: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    rows = models.rows_of(TEXT)
    return oracle.posterior(model, outputs, rows, rows, noise=noise)


def right(la: LaplaceLoRA, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    mean, covariance = la.logit_distribution(TEXT)
    assert oracle.error(mean, expected[0]) < 1e-9
    assert oracle.error(covariance, expected[1]) < 1e-9


@pytest.mark.parametrize(
    "labels", [CLASSES.int(), CLASSES, CLASSES.tolist()], ids=["int32", "int64", "a list"]
)
def test_labels_of_every_kind(labels):
    model = bert()
    right(fit(model, Classes(), TEXT | {"labels": labels}), exact(model, models.classes_of))


def test_a_column_of_text_is_no_input():
    model = bert()
    la = fit(model, Classes(), TEXT | {"text": ["a", "b", "c", "d"], "labels": CLASSES})
    right(la, exact(model, models.classes_of))


def test_boolean_labels():
    model = bert(num_labels=2)
    labels = torch.tensor([True, False, True, False])
    right(fit(model, Classes(), TEXT | {"labels": labels}), exact(model, models.classes_of))


@pytest.mark.parametrize("labels", [torch.tensor([0.0, 1, 2, 0]), CLASSES], ids=["reals", "rounded"])
def test_regression_with_one_label_an_example(labels):
    model = bert(num_labels=1)
    la = fit(model, Regression(noise=0.5), TEXT | {"labels": labels})
    right(la, exact(model, models.classes_of, noise=0.5))


def test_one_logit_by_a_function():
    model = reward()
    two = lambda output, batch: torch.cat([torch.zeros_like(output.logits), output.logits], 1)  # noqa: E731
    la = fit(model, Outputs(two), TEXT | {"labels": torch.tensor([0, 1, 0, 1])})
    right(la, exact(model, lambda model, row: two(model(**row), row)[0]))


@pytest.mark.parametrize("masked", [True, False])
def test_multiple_choice(masked):
    """Two choices an example: right, or refused with a typed error."""
    model = bert("MultipleChoice")
    batch = {"input_ids": IDS.view(2, 2, 7), "labels": torch.tensor([0, 1])}
    if masked:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    rows = [{key: value[n : n + 1] for key, value in batch.items() if key != "labels"} for n in range(2)]
    expected = oracle.posterior(model, models.classes_of, rows, rows)
    try:
        la = fit(model, Classes(), batch)
    except InvalidBatchError:
        return
    mean, covariance = la.logit_distribution({key: value for key, value in batch.items() if key != "labels"})
    assert oracle.error(mean, expected[0]) < 1e-9
    assert oracle.error(covariance, expected[1]) < 1e-9
