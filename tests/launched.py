"""What each process of a launcher runs in `test_launchers`: a joint fit and held-out tuning, compared with one process.

Called by torchrun or accelerate launch with a folder; every rank writes what it found there.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from laplace_lora_fast import KFAC, Answers, HeldOut, LaplaceLoRA
from tests import tiny

ANSWERS = Answers(tiny.ANSWERS)
TEST = tiny.batch(4, 5, seed=2)


def shares(world: int) -> list[list[tiny.Batch]]:
    """Uneven; of four ranks one has a single example and one nothing."""
    if world == 2:
        return [[tiny.batch(3, 6, seed=1), tiny.batch(2, 4, seed=2)], [tiny.batch(4, 5, seed=3)]]
    return [[tiny.batch(3, 6, seed=1)], [], [tiny.batch(1, 4, seed=2)], [tiny.batch(2, 5, seed=3)] * 2]


def found(share: list[tiny.Batch], group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """Probabilities and evidence under rows and KFAC, tuned on held-out data, each rank its share of them."""
    out = []
    for structure in ("rows", KFAC(factors="dense")):
        la = LaplaceLoRA(tiny.tiny_llama(), ANSWERS, structure=structure)
        la.fit(share, group=group, progress=False)
        la.optimize_prior_precision(HeldOut(share, grid=(0.1, 1, 10), group=group), progress=False)
        out += [la.predict(TEST), la.log_marginal_likelihood(), torch.tensor(la.prior_precision)]
    return out


if __name__ == "__main__":
    how, folder = sys.argv[1:]
    torch.set_num_threads(1)
    if how == "accelerate":
        import accelerate

        accelerate.PartialState(cpu=True, backend="gloo")
    else:
        dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = found(shares(dist.get_world_size())[rank], dist.group.WORLD)
    torch.save(mine, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
