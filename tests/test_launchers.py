"""torchrun with four processes, and with accelerate's own state in two: what one process finds. fp64, 1e-9."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from laplace_lora_fast import LaplaceWarning
from tests import launched
from tests.oracle import assert_close

ROOT = Path(__file__).parents[1]


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def command(world):
    """`accelerate launch` starts several processes on a CPU by MPI only: its state is made under torchrun."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    return [*run, "--master-addr", "127.0.0.1", "--master-port", str(port())]


@pytest.mark.parametrize(("how", "world"), [("torchrun", 4), ("accelerate", 2)])
def test_as_one_process(how, world, tmp_path):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [*command(world), str(ROOT / "tests" / "launched.py"), how, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LaplaceWarning)
        expected = launched.found([batch for share in launched.shares(world) for batch in share], None)
    for rank in range(world):
        mine = torch.load(tmp_path / f"{rank}.pt")
        for one, other in zip(mine, expected, strict=True):
            assert_close(one, other, 1e-9)
