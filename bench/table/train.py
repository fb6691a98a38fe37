"""Trains what a cell of the table needs, and keeps it: `python -m bench.table.train --model MiniLM --seeds 0 1`.

For each seed: the model in question, the further members of a deep ensemble, and the models without a fold each. Those
take as many steps as the model in question, not as many epochs of their fewer rows: with less training they would be
less sure than it, and what is chosen on them too weak. Resumable: a run that is there is not repeated.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bench.table.subjects import KEPT, SUBJECTS, Data, Subject, data, train
from laplace_lora_fast.prior.cross_fit import rows_of, split

N_TRAIN, N_HELD_OUT, N_TEST, FOLDS, MEMBERS = 100, 60, 400, 4, 2
CACHE = Path("build/table")


def rows_of_seed(seed: int) -> Data:
    """The data of a seed."""
    return data(seed, N_TRAIN, N_HELD_OUT, N_TEST)


def runs(seed: int) -> dict[str, tuple[list[object], int]]:
    """For each run of a seed its training rows, and the seed of its initialisation and order."""
    rows = rows_of_seed(seed).train
    found: dict[str, tuple[list[object], int]] = {"main": (rows, seed)}
    for fold, left_out in enumerate(split(len(rows), FOLDS, seed)):
        found[f"fold{fold}"] = rows_of(rows, left_out)[0], seed
    for member in range(1, MEMBERS + 1):
        found[f"member{member}"] = rows, seed + 1000 * member
    return found


def place(subject: Subject, seed: int, run: str, epoch: int) -> Path:
    """Where a snapshot is kept."""
    return CACHE / subject.name / str(seed) / run / f"{epoch}.safetensors"


def snapshot(subject: Subject, seed: int, run: str, epoch: int) -> nn.Module:
    """The model of a run after an epoch."""
    model, _, _ = subject.adapted(runs(seed)[run][1])
    state = load_file(place(subject, seed, run, epoch))
    missing = set(state) - set(dict(model.named_parameters()))
    assert not missing, missing
    with torch.no_grad():
        for name, value in state.items():
            model.get_parameter(name).copy_(value)
    return model.eval()


def ensure(subject: Subject, seed: int, run: str, epochs: int) -> None:
    """Trains a run for so many epochs, those of the model in question also in a fold, unless that is done."""
    rows, own_seed = runs(seed)[run]
    steps = -(-len(rows_of_seed(seed).train) // subject.batch_size)
    ends = {end for end in subject.epochs.values() if end <= epochs}
    wanted = {end - back for end in ends for back in range(KEPT if run == "main" else 1)} - {0, -1}
    if place(subject, seed, run, epochs).exists():
        return

    def keep(step: int, model: nn.Module) -> None:
        epoch, rest = divmod(step, steps)
        if epoch in wanted and not rest:
            file = place(subject, seed, run, epoch)
            file.parent.mkdir(parents=True, exist_ok=True)
            state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            save_file(state, file)

    start = time.process_time()
    train(subject, rows, own_seed, epochs * steps, keep)
    print(f"{subject.name} seed {seed} {run}: {time.process_time() - start:.0f} s of a core", flush=True)


def main() -> None:
    """Trains all runs of the seeds, the models in question first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=SUBJECTS, default="MiniLM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        for run in runs(seed):
            subject = SUBJECTS[arguments.model]
            ensure(subject, seed, run, max(subject.epochs.values()))


if __name__ == "__main__":
    main()
