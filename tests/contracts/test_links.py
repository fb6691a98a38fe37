"""A link from outside the package is a link like any other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from laplace_lora_fast import Answers, HeldOut, LaplaceLoRA
from laplace_lora_fast.cli import checks
from laplace_lora_fast.likelihoods import Categorical, links
from tests import tiny
from tests.oracle import assert_close

ANSWERS = Answers(tiny.ANSWERS)


def plug_in(mean: Tensor, cov: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
    return torch.nn.functional.pad(mean, (1, 0)).softmax(-1)


def first_only(mean: Tensor, cov: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
    """Shows how many samples were asked for."""
    probs = plug_in(mean, cov, n_samples, generator) / n_samples
    return torch.cat([1 - probs[..., 1:].sum(-1, keepdim=True), probs[..., 1:]], -1)


@pytest.fixture
def registered() -> Iterator[None]:
    links.link("plug_in", plug_in)
    links.link("first_only", first_only, samples=True)
    yield
    for name in ("plug_in", "first_only"):
        del links._LINKS[name]
        links.LINKS.remove(name)
    links.SAMPLING_LINKS.remove("first_only")


@pytest.fixture(scope="module")
def la() -> LaplaceLoRA:
    return LaplaceLoRA(tiny.tiny_llama(), ANSWERS).fit([tiny.batch(6)], progress=False)


@pytest.mark.filterwarnings("ignore::laplace_lora_fast.errors.LaplaceWarning")  # of the grid's edge
@pytest.mark.usefixtures("registered")
def test_it_is_effective_everywhere(la: LaplaceLoRA) -> None:
    batch = tiny.batch(4, seed=1)
    plain = la.predict(batch, link_approx="map")
    assert_close(la.predict(batch, link_approx="plug_in"), plain, 1e-9)
    loaded = la.predictions([batch], link_approx="plug_in", progress=False)
    assert_close(loaded.probs, plain, 1e-9)
    halved = la.predict(batch, link_approx="first_only", n_samples=2)
    assert_close(halved[:, 1:], plain[:, 1:] / 2, 1e-9)
    checks.check_link("plug_in")
    la.optimize_prior_precision(HeldOut([batch], link_approx="plug_in", grid=(0.1, 1.0)), progress=False)


@pytest.mark.usefixtures("registered")
def test_its_options_are_checked(la: LaplaceLoRA) -> None:
    with pytest.raises(ValueError, match="no effect on link_approx='plug_in'"):
        la.predict(tiny.batch(4), link_approx="plug_in", n_samples=3)
    links.link("plug_in", first_only, samples=True)  # again: the last one counts
    assert links.LINKS.count("plug_in") == 1
    assert la.predict(tiny.batch(4), link_approx="plug_in", n_samples=3).shape == (4, 3)
    links.link("plug_in", plug_in)
    assert "plug_in" not in links.SAMPLING_LINKS


def test_the_default_stays_and_others_are_unknown(la: LaplaceLoRA) -> None:
    assert Categorical().links[0] == "probit"
    with pytest.raises(ValueError, match="link_approx must be one of"):
        la.predict(tiny.batch(4), link_approx="plug_in")
