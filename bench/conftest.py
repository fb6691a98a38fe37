"""Models and data of the benchmarks."""

from __future__ import annotations

import pytest
from torch import nn

from bench import models
from bench.measure import Setting


@pytest.fixture(scope="session", params=list(models.SIZES))
def size(request: pytest.FixtureRequest) -> tuple[str, models.Size, nn.Module]:
    chosen = models.SIZES[request.param]
    return request.param, chosen, models.build(chosen)


@pytest.fixture(scope="session")
def setting(size: tuple[str, models.Size, nn.Module]) -> Setting:
    """No padding: what the peers can be compared on."""
    name, chosen, model = size
    return Setting(
        name, False, model, models.batches(chosen, padded=False), chosen.rounds, chosen.peer_rounds
    )


@pytest.fixture(scope="session")
def padded(size: tuple[str, models.Size, nn.Module]) -> Setting:
    name, chosen, model = size
    return Setting(name, True, model, models.batches(chosen, padded=True), chosen.rounds, chosen.peer_rounds)
