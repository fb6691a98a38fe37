"""Numbers that cannot be right are errors, and so is asking before there are any."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace_lora_fast import (
    EKFAC,
    KFAC,
    Classes,
    HeldOut,
    InvalidBatchError,
    LaplaceError,
    LaplaceLoRA,
    LaplaceWarning,
    NotFittedError,
    NumericalError,
    Outputs,
    RankError,
    Regression,
    Rows,
    StateError,
    UnsupportedAdapterError,
)
from tests import tiny
from tests.model.taps import ANSWERS


def test_every_error_is_a_laplace_error_and_of_its_builtin_kind():
    kinds = {
        InvalidBatchError: ValueError,
        UnsupportedAdapterError: ValueError,
        StateError: ValueError,
        NotFittedError: RuntimeError,
        RankError: RuntimeError,
        NumericalError: ArithmeticError,
    }
    for error, builtin in kinds.items():
        assert issubclass(error, LaplaceError)
        assert issubclass(error, builtin)


def test_before_fit(tmp_path):
    la = LaplaceLoRA(tiny.tiny_llama(), ANSWERS)
    for call in (
        lambda: la.predict(tiny.batch(2)),
        lambda: la.predict(tiny.batch(2), link_approx="map"),
        lambda: la.predictions([tiny.batch(2)]),
        lambda: la.logit_distribution(tiny.batch(2)),
        lambda: la.log_marginal_likelihood(),
        lambda: la.optimize_prior_precision(),
        lambda: la.optimize_prior_precision(HeldOut([tiny.batch(2)])),
        lambda: la.posterior,
        lambda: la.factors,
        lambda: la.summary(),
        lambda: la.snapshot(),
        lambda: la.sample_adapters(tmp_path / "samples", 1, force=True),
        lambda: la.save(tmp_path / "posterior"),
    ):
        with pytest.raises(NotFittedError, match="fit"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_before_fit_of_a_regression():
    la = LaplaceLoRA(tiny.tiny_llama_classifier(1), Regression())
    for call in (
        lambda: la.predict(tiny.batch(2)),
        lambda: la.predictive_variance(tiny.batch(2)),
        lambda: la.predictions([tiny.batch(2)]),
    ):
        with pytest.raises(NotFittedError, match="fit"):
            call()


@pytest.mark.parametrize("where", ["base", "lora"])
def test_weights_that_are_not_finite(where):
    model = tiny.tiny_llama(targets=("q_proj",))
    name = "lora_A.default.weight" if where == "lora" else "o_proj.weight"
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith(name))[0, 0] = torch.nan
    with pytest.raises(InvalidBatchError, match=r"batch 0 .*not finite"):
        LaplaceLoRA(model, ANSWERS).fit([tiny.batch(3)], progress=False)


class Huge(nn.Module):
    """Finite logits whose curvature overflows."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.inner(1e30 * x) * 1e-30)


OVERFLOWING = [
    structure(tokens=tokens, **factors)
    for structure in (KFAC, EKFAC)
    for tokens in ("expand", "reduce")
    for factors in ({"factors": "dense"}, {"factors": "sketch", "columns": 2})
]


@pytest.mark.parametrize("structure", OVERFLOWING, ids=repr)
def test_curvature_that_overflows(structure):
    model = tiny.adapt(Huge(), dtype=torch.float32, targets=("head", "inner"), r=2)
    la = LaplaceLoRA(model, Classes(), structure=structure)
    with pytest.raises(NumericalError, match=r"'base_model.model.inner'.*not finite"):
        la.fit([{"x": torch.randn(5, 4)}], progress=False)
    with pytest.raises(NotFittedError):
        _ = la.posterior


def test_evidence_without_a_maximum():
    model, train = tiny.tiny_llama(), [tiny.batch(4)]
    la = LaplaceLoRA(model, ANSWERS, prior_mean=model.state_dict()).fit(train, progress=False)
    flat = LaplaceLoRA(model, Outputs(lambda out, _: 0 * out.logits[:, -1, :3])).fit(train, progress=False)
    for each, match in ((la, "equal the prior mean"), (flat, "curvature is zero")):
        with pytest.raises(NumericalError, match=match):
            each.optimize_prior_precision()
        assert each.prior_precision == 1.0


@pytest.mark.parametrize("structure", [KFAC(), Rows()], ids=repr)
def test_held_out_data_at_the_edge_of_the_grid_warn(structure):
    la = LaplaceLoRA(tiny.tiny_llama(), ANSWERS, structure=structure).fit([tiny.batch(6)], progress=False)
    with pytest.warns(LaplaceWarning, match="edge of the grid") as warned:
        la.optimize_prior_precision(HeldOut([tiny.batch(4)], grid=[1e-30, 1e-29]), progress=False)
    assert [warning.filename for warning in warned if warning.category is LaplaceWarning] == [__file__]
