"""Two processes with a share of the data each leave with the posterior of one process with all of it. fp64, 1e-9."""

from __future__ import annotations

import functools
import os
import socket
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from laplace_lora_fast import (
    EKFAC,
    KFAC,
    Answers,
    Diagonal,
    InvalidBatchError,
    LaplaceLoRA,
    RankError,
    Rows,
)
from laplace_lora_fast.integrations.trainer import LaplaceCallback
from laplace_lora_fast.ranks import Ranks
from laplace_lora_fast.structures.blocks.factors import SketchFactor
from tests import tiny
from tests.integrations import test_trainer as trainers
from tests.oracle import assert_close

WORLD = 2
TEST = tiny.batch(4, 5, seed=2)
ANSWERS = Answers(tiny.ANSWERS)
FITS = {
    "kfac reduce": KFAC(factors="dense"),
    "kfac expand": KFAC(tokens="expand", factors="dense"),
    # So wide that a sketch is exact, if and only if all ranks have the same one.
    "kfac sketch": KFAC(tokens="expand", factors="sketch", columns=16),
    "kfac, few rows": KFAC(factors="dense"),
    "kfac empirical": KFAC(fisher="empirical", factors="dense"),
    "ekfac": EKFAC(factors="dense"),
    "diagonal": Diagonal(),
    "rows": Rows(),
    "rows empirical": Rows(fisher="empirical"),
    "rows, in files": Rows(),
    "auto": "auto",
    "refit": Rows(refit=True),
    "kfac, first rank empty": KFAC(factors="dense"),
    "kfac sketch, first rank empty": KFAC(tokens="expand", factors="sketch", columns=16),
    "ekfac, last rank empty": EKFAC(factors="dense"),
    "diagonal, last rank empty": Diagonal(),
    "rows, first rank empty": Rows(),
    "refit, last rank empty": Rows(refit=True),
    "auto, last rank empty": "auto",
}


def shares(name=""):
    """Batches of every rank: not as many, not as large; or so few that no factor is accumulated."""
    if "first rank empty" in name:
        return [[], *shares()[1:]]
    if "last rank empty" in name:
        return [shares()[0], []]
    if name == "kfac, few rows":
        return [[tiny.batch(1, 6, seed=1)], [tiny.batch(1, 4, seed=2)]]
    first = [tiny.batch(n, length, seed=n) for n, length in ((3, 6), (2, 4), (5, 7))]
    return [first, [tiny.batch(4, 5, seed=9)]]


def examples(name):
    return sum(len(batch["labels"]) for share in shares(name) for batch in share)


def build(rank=0):
    return tiny.tiny_llama(targets=("q_proj", "v_proj"))


def seen(la):
    """Everything a user can see of a fit, by name; nothing in it depends on an eigenvector's sign."""
    out = {"evidence": la.log_marginal_likelihood(), "probabilities": la.predict(TEST)}
    out["mean"], out["covariance"] = la.logit_distribution(TEST)
    for name, layer in la.factors.items() if type(la.structure) is KFAC else ():
        for side, weight in (("A", layer.A), ("B", layer.B)):
            out[f"{name} {side} input"] = weight.input_factor
            out[f"{name} {side} gradient"] = weight.gradient_factor
    if la.structure == FITS["refit"]:
        prior = torch.full((len(la.posterior.curvature.names),), 0.7, dtype=torch.float64)
        ((examples, out["left out"], out["covariance left out"], labels),) = (
            la.posterior.curvature.leave_one_out(prior)
        )
        out |= {"examples left out": examples.double(), "labels left out": labels.double()}
    return out


def fit(model, loader, structure, group=None, budget=None):
    la = LaplaceLoRA(model, ANSWERS, structure=structure, prior_precision=0.7, budget=budget)
    return la.fit(loader, group=group, progress=False)


def fit_named(name, loader, group=None):
    return fit(build(), loader, FITS[name], group, 1000 if "files" in name else None)


def good(rank, group, name):
    la = fit_named(name, shares(name)[rank], group)
    return seen(la), repr(la.snapshot()[0].structure), la.snapshot()[0].n_examples


def nobody_has_a_batch(rank, group):
    fit(build(), [], "kfac", group)


def one_has_a_bad_label(rank, group):
    batch = tiny.batch(3, 5, seed=1)
    labels = batch["labels"].clone().fill_(99 if rank == 1 else 0)
    fit(build(), [{**batch, "labels": labels}], "auto", group)


def one_has_an_iterator(rank, group):
    batches = shares()[rank]
    fit(build(), iter(batches) if rank == 1 else batches, "ekfac", group)


def other_weights(rank, group):
    model = build()
    tiny.randomise(model, seed=rank)
    fit(model, shares()[rank], "diagonal", group)


def one_has_no_labels(rank, group):
    batches = [{k: v for k, v in batch.items() if rank == 0 or k != "labels"} for batch in shares()[rank]]
    la = fit(build(), batches, "kfac", group)
    return la.snapshot()[0].log_likelihood


def gathered(rank, group):
    ranks = Ranks(group)
    rows = ranks.gather(torch.full((2 * rank, 3), float(rank)))
    total = torch.tensor([1.0, 10.0 * rank])
    ranks.sum_([total])
    assert ranks.first(rank == 1) == 1
    return rows, total, ranks.from_rank(0, torch.tensor([5 + rank])), ranks.gather_numbers([rank, 7])


class Recording(LaplaceCallback):
    """Remembers what this rank was given to fit on."""

    def _batches(self, *arguments, **options):
        self.batches = super()._batches(*arguments, **options)
        return self.batches


def sampled(rank, group):
    """The same batch on both ranks: the joint Fisher information, and this rank's alone."""
    structure = KFAC(fisher="mc", factors="dense")
    fits = [fit(build(), [TEST], structure, each) for each in (group, None)]
    return [next(iter(la.factors.values())).A.gradient_factor for la in fits]


def trainer(rank, group, folder):
    """The Trainer's callback shares its training set out."""
    structure = KFAC(tokens="expand")
    callback = Recording(ANSWERS, tuning=None, structure=structure)
    run = trainers.trainer(Path(folder) / "trainer", callback)
    assert run.args.world_size == WORLD
    run.train()
    expected = LaplaceLoRA(run.model, ANSWERS, structure=structure).fit([trainers.TRAIN], progress=False)
    evidence = [la.log_marginal_likelihood(1.0) for la in (callback.laplace, expected)]
    share = sum(len(batch["labels"]) for batch in callback.batches)
    return evidence, callback.laplace.snapshot()[0].n_examples, share


FAULTS = [nobody_has_a_batch, one_has_a_bad_label, one_has_an_iterator, other_weights]
JOBS = {name: functools.partial(good, name=name) for name in FITS}
JOBS |= {job.__name__: job for job in (*FAULTS, one_has_no_labels, gathered, sampled)}


def outcome(job, *arguments):
    """What a job returns, or the kind and the message of what it raises."""
    try:
        return job(*arguments)
    except Exception as error:
        traceback.print_exc()
        return type(error), str(error)


def worker(rank, folder):
    torch.set_num_threads(1)
    port = (Path(folder) / "port").read_text()
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launched.items()})  # as torchrun does
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo")
    jobs = JOBS | {"trainer": functools.partial(trainer, folder=folder)}
    found = {name: outcome(job, rank, dist.group.WORLD) for name, job in jobs.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank found in each job."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    mp.spawn(worker, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("name", FITS)
def test_world_size(ranks, name):
    alone = fit_named(name, [batch for share in shares(name) for batch in share])
    expected = seen(alone)
    for found in ranks:
        mine, structure, n_examples = found[name]
        assert structure == repr(alone.snapshot()[0].structure)
        assert n_examples == alone.snapshot()[0].n_examples == examples(name)
        assert mine.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(mine[key], value, 1e-9)


@pytest.mark.parametrize("name", FITS)
def test_ranks_agree_bitwise(ranks, name):
    """Else the ranks would choose different prior precisions."""
    first, second = (found[name][0] for found in ranks)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.mark.parametrize("job", [one_has_a_bad_label, one_has_an_iterator])
def test_a_failing_rank_stops_all(ranks, job):
    kinds = [found[job.__name__][0] for found in ranks]
    assert kinds == [RankError, InvalidBatchError]


def test_no_data_at_all(ranks):
    for found in ranks:
        assert found[nobody_has_a_batch.__name__] == (InvalidBatchError, "the loader yielded no batch")


def test_ranks_with_different_adapters_are_refused(ranks):
    for found in ranks:
        kind, message = found[other_weights.__name__]
        assert kind is RankError
        assert "weights" in message


def test_missing_labels_on_one_rank_leave_no_evidence(ranks):
    assert [found[one_has_no_labels.__name__] for found in ranks] == [None, None]


def test_collectives(ranks):
    for rows, total, first, numbers in (found["gathered"] for found in ranks):
        assert torch.equal(rows, torch.ones(2, 3))
        assert torch.equal(total, torch.tensor([2.0, 10.0]))
        assert torch.equal(first, torch.tensor([5]))
        assert numbers.tolist() == [[0, 7], [1, 7]]


def test_ranks_draw_their_own_labels(ranks):
    (joint, alone), (other, _) = (found["sampled"] for found in ranks)
    assert torch.equal(joint, other)
    assert (joint - 2 * alone).norm() > 0.01 * joint.norm()


def test_trainer(ranks):
    for found in ranks:
        (joint, alone), n, share = found["trainer"]
        assert n == WORLD * share == len(trainers.TRAIN["labels"])
        torch.testing.assert_close(joint, alone, rtol=1e-5, atol=0)


def test_sketches_with_one_omega_add_up():
    x = torch.randn(60, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = torch.eye(12, 2, dtype=torch.float64)
    whole = SketchFactor(6, exact, torch.float64, seed=0)
    whole.add_tokens(x, None)
    parts = [SketchFactor(6, exact, torch.float64, seed=9 + i, omega=whole.omega) for i in range(2)]
    for part, rows in zip(parts, x.split([20, 40]), strict=True):
        part.add_tokens(rows, None)
    parts[0].merge(parts[1])
    for mine, expected in zip(
        (parts[0].spectrum(3).dense(), parts[0].quadratic(exact)),
        (whole.spectrum(3).dense(), whole.quadratic(exact)),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)
