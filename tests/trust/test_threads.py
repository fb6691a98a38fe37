"""A server answers in several threads with one model: every answer is right, and plain forwards see nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from laplace_lora_fast import Answers
from tests.matrix import models, modes

THREADS, ROUNDS = 4, 20


@pytest.fixture(scope="module")
def served():
    """A posterior, requests of different lengths, and what is right for each."""
    model = modes.decoder()
    batch = models.padded(models.sequences(lengths=(12,) * 4), "none")
    la = models.fitted(model, Answers(models.ANSWERS), batch, models.labels())
    requests = [models.padded(models.sequences(lengths=(5 + k,) * 3, seed=k), "none") for k in range(THREADS)]
    with torch.no_grad():
        plain = [model(**request).logits for request in requests]
    return la, model, requests, [la.predict(request) for request in requests], plain


def in_threads(work: list[Callable[[], None]]) -> list[BaseException]:
    """Errors of all that is done, each in a thread of its own."""
    errors: list[BaseException] = []

    def run(each: Callable[[], None]) -> None:
        try:
            for _ in range(ROUNDS):
                each()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(each,)) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def state(model: torch.nn.Module) -> tuple[int, list[bool], list[bool]]:
    """Hooks, and the flags of modules and parameters."""
    hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    )
    return hooks, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def test_threads_that_predict(served):
    la, model, requests, expected, _ = served
    before, got = state(model), []
    work = [lambda k=k: got.append((k, la.predict(requests[k]))) for k in range(THREADS)]
    assert in_threads(work) == []
    assert len(got) == THREADS * ROUNDS
    for k, probabilities in got:
        torch.testing.assert_close(probabilities, expected[k], rtol=1e-6, atol=0)
    assert state(model) == before


def test_plain_forwards_beside_them(served):
    la, model, requests, expected, plain = served
    got, predicted = [], []

    def forward(k: int) -> None:
        with torch.no_grad():
            got.append((k, model(**requests[k]).logits))

    work = [lambda k=k: forward(k) for k in (0, 1)]
    work += [lambda k=k: predicted.append((k, la.predict(requests[k]))) for k in (2, 3)]
    assert in_threads(work) == []
    assert len(got) == len(predicted) == 2 * ROUNDS
    assert all(torch.equal(logits, plain[k]) for k, logits in got)
    for k, probabilities in predicted:
        torch.testing.assert_close(probabilities, expected[k], rtol=1e-6, atol=0)


def test_plain_forwards_beside_a_fit(served):
    _, model, requests, _, plain = served
    batch = models.padded(models.sequences(lengths=(12,) * 4), "none")
    got, fits = [], []

    def forward() -> None:
        with torch.no_grad():
            got.append(model(**requests[0]).logits)

    def fit() -> None:
        la = models.fitted(model, Answers(models.ANSWERS), batch, models.labels())
        fits.append(la.logit_distribution(batch)[1])

    assert in_threads([forward, fit]) == []
    assert all(torch.equal(logits, plain[0]) for logits in got)
    assert all(torch.equal(covariance, fits[0]) for covariance in fits)
