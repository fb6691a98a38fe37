"""The sizes every job is run at."""

from __future__ import annotations

import pytest

from bench import models


@pytest.fixture(scope="session", params=list(models.SIZES))
def setting(request: pytest.FixtureRequest) -> models.Setting:
    return models.SIZES[request.param]()
