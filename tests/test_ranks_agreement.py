"""Ranks that differ, die or hang: RankError on all of those that are left, never a number."""

from __future__ import annotations

import datetime
import functools
import os
import re
import signal
import socket
import time

import pytest
import torch
import torch.distributed as dist

from laplace_lora_fast import KFAC, Answers, Classes, LaplaceLoRA, Outputs, Rows
from laplace_lora_fast.errors import RankError
from tests import tiny
from tests.processes import CONTEXT

pytestmark = pytest.mark.xdist_group("agreement")  # one start of the processes serves them all

WORLD = 2
DATA = tiny.split(tiny.batch(12), 3)
ANSWERS = Answers(tiny.ANSWERS)


def model(rank, change=None):
    made = tiny.tiny_llama()
    if rank == 1 and change is not None:
        with torch.no_grad():
            change(made)
    return made


def fit(model, task=ANSWERS, **options):
    return LaplaceLoRA(model, task, **options)


def score(rank):
    made = tiny.tiny_llama_classifier(3)
    if rank == 1:
        with torch.no_grad():
            made.base_model.model.score.weight.mul_(-1)
    return fit(made, Classes())


def bump(name):
    def change(made):
        made.get_parameter(f"base_model.model.{name}").view(-1)[1] += 1e-9

    return change


def norm_eps(made):
    made.base_model.model.model.norm.eps = 0.3


def scaled(made):
    made.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] = 5.0


def half(made):
    made.base_model.model.lm_head.to(torch.float32)


def first(out, batch):
    return out.logits[:, -1, :3]


DIFFERENCES = {
    "head": (score, r"parameters, base_model.model.score.weight"),
    "embeddings": (
        lambda r: fit(model(r, bump("model.embed_tokens.weight"))),
        r"parameters, [\w.]+embed_tokens",
    ),
    "base": (
        lambda r: fit(model(r, bump("model.layers.0.mlp.up_proj.weight"))),
        r"parameters, [\w.]+up_proj",
    ),
    "adapter": (
        lambda r: fit(model(r, bump("model.layers.0.self_attn.q_proj.lora_B.default.weight"))),
        r"the adapter's weights, [\w.]+q_proj.lora_B",
    ),
    "dtype": (lambda r: fit(model(r, half)), r'lm_head.weight: rank 0 has \["float64".*rank 1 \["float32"'),
    "scaling": (lambda r: fit(model(r, scaled)), r"scalings.*q_proj: rank 0 has 2.0, rank 1 5.0"),
    "eps": (lambda r: fit(model(r, norm_eps)), r"settings, RMSNorm, eps: rank 0 has 1e-06"),
    "seed": (
        lambda r: fit(model(r), structure=Rows(columns=6), seed=r),
        "options, seed: rank 0 has 0, rank 1 1",
    ),
    "structure": (
        lambda r: fit(model(r), structure=KFAC() if r else Rows()),
        r"options, structure, Rows: rank 0 has \{.*, rank 1 null",
    ),
    "option": (
        lambda r: fit(model(r), structure=Rows(columns=6 + r)),
        "structure, Rows, columns: rank 0 has 6",
    ),
    "tokens": (
        lambda r: fit(model(r), structure=KFAC(tokens="expand" if r else "reduce")),
        'tokens: rank 0 has "reduce", rank 1 "expand"',
    ),
    "fisher": (lambda r: fit(model(r), structure=KFAC(fisher="empirical" if r else "exact")), "fisher"),
    "order of answers": (
        lambda r: fit(model(r), Answers(tiny.ANSWERS[:: 1 - 2 * r])),
        r"task, Answers, token_ids: rank 0 has \[5, 11, 7\], rank 1 \[7, 11, 5\]",
    ),
    "likelihood": (
        lambda r: fit(model(r), Outputs(first, "regression" if r else "classification")),
        "task, Outputs, likelihood",
    ),
    "prior": (
        lambda r: fit(model(r), prior_precision=1.0 + r),
        "prior_precision: rank 0 has 1.0, rank 1 2.0",
    ),
    "prior mean": (
        lambda r: fit(model(0), prior_mean={k: (2 + r) * v for k, v in model(0).state_dict().items()}),
        "prior mean",
    ),
    "layers": (lambda r: fit(model(r), layers="last" if r else None), "layers"),
    "budget": (lambda r: fit(model(r), structure=Rows(), budget=10**6 + r), "budget: rank 0 has 1000000"),
}


def start(rank, port, seconds):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    timeout = datetime.timedelta(seconds=seconds)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timeout)


def outcome(call):
    try:
        return "value", str(call())
    except BaseException as error:
        return type(error).__name__, str(error)


def differ(rank, port, queue):
    """One process group for all: it has to stay usable after each refusal."""
    start(rank, port, 60)
    for name, (make, _) in DIFFERENCES.items():
        la = make(rank)
        queue.put(
            (
                rank,
                name,
                *outcome(lambda la=la: la.fit(DATA[rank::WORLD], group=dist.group.WORLD, progress=False)),
            )
        )
    same = outcome(
        lambda: fit(model(0)).fit(DATA[rank::WORLD], group=dist.group.WORLD, progress=False).predict(DATA[0])
    )
    queue.put((rank, "same", *same))


def trouble(rank, port, queue, how):
    start(rank, port, 5)

    def batches():
        yield DATA[0]
        if rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "gone":
                os._exit(3)
            if how == "interrupted":
                raise KeyboardInterrupt
            time.sleep(12)
        yield DATA[1]

    found = outcome(
        lambda: fit(model(0), structure="rows").fit(batches(), group=dist.group.WORLD, progress=False)
    )
    queue.put((rank, how, *found))
    queue.close()
    queue.join_thread()
    if how == "interrupted" and rank == 1:
        time.sleep(4)  # as in a notebook, whose process goes on
    os._exit(0)


def run(target, *arguments):
    """What each rank has put."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=target, args=(rank, port, queue, *arguments)) for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    found: list[tuple] = []
    end = time.monotonic() + 240
    while any(process.is_alive() for process in processes) or not queue.empty():
        if not queue.empty():
            found.append(queue.get())
        elif time.monotonic() > end:
            for process in processes:
                process.kill()
            pytest.fail(f"ranks do not end: {found}")
        time.sleep(0.01)
    return found


@functools.cache
def refusals():
    return {(rank, name): (kind, message) for rank, name, kind, message in run(differ)}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_that_differ(name):

    found = [refusals()[rank, name] for rank in range(WORLD)]
    for kind, message in found:
        assert kind == RankError.__name__, message
        assert message.startswith("the ranks differ in ")
        assert re.search(DIFFERENCES[name][1], message)
    assert found[0] == found[1]


def test_ranks_that_are_the_same_fit():
    kinds = [refusals()[rank, "same"][0] for rank in range(WORLD)]
    assert kinds == ["value", "value"]


@pytest.mark.parametrize("how", ["killed", "gone", "interrupted", "hanging"])
def test_a_rank_that_is_lost(how):
    began = time.monotonic()
    found = {rank: (kind, message) for rank, _, kind, message in run(trouble, how)}
    kind, message = found[0]
    assert kind == RankError.__name__, message
    if how == "interrupted":
        assert found[1][0] == "KeyboardInterrupt"
        assert "failed on 1 of the other ranks" in message
    else:
        assert "another rank died, hangs, or is later than the process group's timeout" in message
    if how == "hanging":
        assert found[1][0] == RankError.__name__
    assert time.monotonic() - began < 120
