"""Several processes fit together: each passes its share of the data, all leave with the posterior of the whole."""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import toy

from laplace_lora_fast import Answers, LaplaceLoRA

RANKS = 2


def fit(rank, store):
    """What each process does; with torchrun, `dist.init_process_group()` is enough."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    batches = toy.texts(64, seed=0)
    model = toy.causal_model().eval()  # the same on all ranks, or the fit is refused
    la = LaplaceLoRA(model, Answers(toy.ANSWERS))
    la.fit(batches[rank::RANKS], group=dist.group.WORLD)  # a rank that fails stops the others with an error
    if rank == 0:
        alone = LaplaceLoRA(model, Answers(toy.ANSWERS)).fit(batches)
        difference = la.predict(batches[0]) - alone.predict(batches[0])
        print(la, f"differs from one process by {difference.abs().max():.1e}")
        assert difference.abs().max() < 1e-4
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(fit, (Path(folder) / "store",), nprocs=RANKS)
