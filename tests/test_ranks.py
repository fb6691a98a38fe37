"""Two processes with a share of the data each leave with the posterior of one process with all of it. fp64, 1e-9."""

from __future__ import annotations

import functools
import os
import re
import socket
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from laplace_lora_fast import (
    EKFAC,
    KFAC,
    Answers,
    Diagonal,
    HeldOut,
    InvalidBatchError,
    LaplaceLoRA,
    LowRank,
    Options,
    RankError,
    Regression,
    Rows,
    Tokens,
    UnsupportedAdapterError,
)
from laplace_lora_fast.data import option_batches_from_ids
from laplace_lora_fast.integrations.trainer import LaplaceCallback
from laplace_lora_fast.ranks import Ranks
from laplace_lora_fast.structures.blocks.factors import SketchFactor
from tests import tiny
from tests.integrations import test_trainer as trainers
from tests.oracle import assert_close
from tests.processes import CONTEXT
from tests.tasks.test_options import examples as option_examples

pytestmark = pytest.mark.xdist_group("world")  # one start of the processes serves them all

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
    "low rank": LowRank(rank=10, columns=8),
    "auto": "auto",
    "refit": Rows(refit=True),
    "kfac, first rank empty": KFAC(factors="dense"),
    "kfac sketch, first rank empty": KFAC(tokens="expand", factors="sketch", columns=16),
    "ekfac, last rank empty": EKFAC(factors="dense"),
    "diagonal, last rank empty": Diagonal(),
    "rows, first rank empty": Rows(),
    "low rank, first rank empty": LowRank(rank=10, columns=8),
    "refit, last rank empty": Rows(refit=True),
    "auto, last rank empty": "auto",
    "options, rows": Rows(),
    "options, refit": Rows(refit=True),
    "options, kfac, first rank empty": KFAC(factors="dense"),
    "tokens, rows": Rows(),
    "tokens, kfac expand": KFAC(tokens="expand", factors="dense"),
}


def shares(name=""):
    """Batches of every rank: not as many, not as large; or so few that no factor is accumulated."""
    if "first rank empty" in name:
        return [[], *shares(name.split(",")[0])[1:]]
    if "last rank empty" in name:
        return [shares()[0], []]
    if "options" in name:
        drawn = option_examples(9)
        return [option_batches_from_ids(drawn[:6], 2), option_batches_from_ids(drawn[6:], 3)]
    if name == "kfac, few rows":
        return [[tiny.batch(1, 6, seed=1)], [tiny.batch(1, 4, seed=2)]]
    first = [tiny.batch(n, length, seed=n) for n, length in ((3, 6), (2, 4), (5, 7))]
    return [first, [tiny.batch(4, 5, seed=9)]]


def examples(name):
    return sum(len(batch["labels"]) for share in shares(name) for batch in share)


def build(rank=0):
    return tiny.tiny_llama(targets=("q_proj", "v_proj"))


def with_token_labels(batch):
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def seen(la):
    """Everything a user can see of a fit, by name; nothing in it depends on an eigenvector's sign."""
    if la.likelihood.sampled:
        return dict(zip(("mean", "variance"), la.sequence_log_prob(with_token_labels(TEST)), strict=True))
    of_options = la.task == Options()  # each has functions of its own number: no one covariance
    test = option_batches_from_ids(option_examples(4, 1), 4)[0] if of_options else TEST
    out = {"evidence": la.log_marginal_likelihood(), "probabilities": la.predict(test)}
    if not of_options:
        out["mean"], out["covariance"] = la.logit_distribution(test)
    for name, layer in la.factors.items() if type(la.structure) is KFAC else ():
        for side, weight in (("A", layer.A), ("B", layer.B)):
            out[f"{name} {side} input"] = weight.input_factor
            out[f"{name} {side} gradient"] = weight.gradient_factor
    if la.structure == FITS["refit"]:
        prior = torch.full((len(la.posterior.curvature.names),), 0.7, dtype=torch.float64)
        for size, (examples, *left, labels) in enumerate(la.posterior.curvature.leave_one_out(prior)):
            left += [examples.double(), labels.double()]
            out |= {f"left out, {part}, {size}": value for part, value in enumerate(left)}
    return out


def fit(model, loader, structure, group=None, budget=None, task=ANSWERS):
    la = LaplaceLoRA(model, task, structure=structure, prior_precision=0.7, budget=budget)
    return la.fit(loader, group=group, progress=False)


def fit_named(name, loader, group=None):
    if "tokens" in name:
        loader = [with_token_labels(batch) for batch in loader]
        return fit(build(), loader, FITS[name], group, task=Tokens(samples=2))
    if "options" in name:
        return fit(build(), loader, FITS[name], group, task=Options())
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


def held_out(rank, group, task=ANSWERS, structure="rows", shares_of=None):
    """The prior precision by held-out data in shares: uneven, and one empty."""
    model, batches, held = shares_of() if shares_of else (build(), shares(), shares("last rank empty"))
    la = LaplaceLoRA(model, task, structure=structure).fit(batches[rank], group=group, progress=False)
    found = []
    for options in ({}, {"grid": (0.01, 0.1, 1, 10)}) if task is ANSWERS else ({"grid": (0.1, 1, 10)},):
        la.optimize_prior_precision(HeldOut(held[rank], group=group, **options), progress=False)
        found.append((la.prior_precision, la.sigma_noise))
    return found


def regression():
    model = tiny.tiny_llama_classifier(1)
    batches = [
        [tiny.batch(3, 5, classes=0, seed=3 * rank + index) for index in range(2)] for rank in range(WORLD)
    ]
    return model, batches, [[tiny.batch(2, 5, classes=0, seed=20)], [tiny.batch(5, 5, classes=0, seed=21)]]


def texts():
    batches = [
        [
            batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
            for batch in share
        ]
        for share in shares()
    ]
    return build(), batches, [batches[0][:2], []]


def options():
    batches = shares("options")
    held = option_batches_from_ids(option_examples(5, 2), 2)
    return build(), batches, [held[:1], held[1:]]


HELD = {
    "answers": {},
    "options": {"task": Options(), "shares_of": options},
    "regression": {"task": Regression(), "shares_of": regression},
    "tokens": {"task": Tokens(samples=2), "shares_of": texts},
}


def data_parallel(rank, group):
    """Its forward passes would wait for each other where shares are uneven."""
    model = torch.nn.parallel.DistributedDataParallel(build())
    return seen(fit(model, shares("last rank empty")[rank], "rows", group))


def fully_sharded(rank, group):
    model = build()
    torch.distributed.fsdp.fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    LaplaceLoRA(model, ANSWERS)


def one_layer_sharded(rank, group):
    """As a tensor-parallel plan shards it."""
    model = build()
    block = model.base_model.model.model.layers[0]
    parallelize_module(block, init_device_mesh("cpu", (WORLD,)), {"mlp.up_proj": ColwiseParallel()})
    LaplaceLoRA(model, ANSWERS)


def tensor_parallel(rank, group):
    model = build()
    model.base_model.model._tp_size = WORLD
    LaplaceLoRA(model, ANSWERS)


SHARDED = {
    fully_sharded: "sharded by FSDP: no rank holds whole weights. Load the adapter on an unsharded copy",
    one_layer_sharded: "up_proj.weight' is a DTensor, spread over processes",
    tensor_parallel: "tensor parallel over 2 processes .tp_plan.: no rank holds whole weights.*Load it without tp_plan",
}


def held_out_of_none(rank, group):
    la = LaplaceLoRA(build(), ANSWERS, structure="rows").fit(shares()[rank], group=group, progress=False)
    la.optimize_prior_precision(HeldOut([], group=group), progress=False)


def held_out_otherwise(rank, group):
    la = LaplaceLoRA(build(), ANSWERS, structure="rows").fit(shares()[rank], group=group, progress=False)
    la.optimize_prior_precision(HeldOut([TEST], per="all" if rank else "side", group=group), progress=False)


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
JOBS |= {f"held out {name}": functools.partial(held_out, **options) for name, options in HELD.items()}
JOBS |= {job.__name__: job for job in (held_out_of_none, held_out_otherwise, data_parallel, *SHARDED)}
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
    mp.start_processes(worker, (str(folder),), nprocs=WORLD, start_method=CONTEXT.get_start_method())
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


@pytest.mark.filterwarnings("ignore::laplace_lora_fast.errors.LaplaceWarning")  # of the grid's edge
@pytest.mark.parametrize("name", HELD)
def test_held_out_data_in_shares(ranks, name):
    """As one process finds it with all of them."""

    def together(made):
        model, train, held = made
        return (
            model,
            [[batch for share in train for batch in share]],
            [[batch for share in held for batch in share]],
        )

    options = dict(HELD[name])
    make = options.pop("shares_of", lambda: (build(), shares(), shares("last rank empty")))
    alone = held_out(0, None, **options, shares_of=lambda: together(make()))
    for found in ranks:
        assert found[f"held out {name}"] == ranks[0][f"held out {name}"]
        for (mine, noise), (expected, expected_noise) in zip(found[f"held out {name}"], alone, strict=True):
            assert mine == pytest.approx(expected, rel=1e-9)
            assert noise == (None if expected_noise is None else pytest.approx(expected_noise, rel=1e-9))


def test_data_parallel_wrappers_do_not_wait_for_each_other(ranks):
    expected = seen(fit(build(), shares()[0], "rows"))
    for found in ranks:
        for key, value in expected.items():
            assert_close(found["data_parallel"][key], value, 1e-9)


@pytest.mark.parametrize("job", SHARDED)
def test_sharded_models_are_refused_by_name(ranks, job):
    for found in ranks:
        kind, message = found[job.__name__]
        assert kind is UnsupportedAdapterError
        assert re.search(SHARDED[job], message)


def test_held_out_faults(ranks):
    for found in ranks:
        assert found["held_out_of_none"] == (InvalidBatchError, "the loader yielded no batch")
        kind, message = found["held_out_otherwise"]
        assert kind is RankError
        assert "the ranks differ in the grid" in message


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
