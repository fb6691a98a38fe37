"""Ways of tuning: which one is taken, and what is refused."""

from __future__ import annotations

import pytest

from laplace_lora_fast import Answers, Evidence, HeldOut, LaplaceLoRA, LeaveOneOut, Rows
from tests import tiny

TRAIN = tiny.batch(9, length=6, seed=1)


@pytest.mark.filterwarnings("ignore:the best prior precision lies on the edge")
def test_the_evidence_is_the_default() -> None:
    la = LaplaceLoRA(tiny.tiny_llama(), Answers(tiny.ANSWERS), structure="kfac").fit([TRAIN], progress=False)
    found = la.optimize_prior_precision()
    assert found == la.optimize_prior_precision(Evidence()) == la.optimize_prior_precision("evidence")
    refit = LaplaceLoRA(tiny.tiny_llama(), Answers(tiny.ANSWERS), structure=Rows(refit=True))
    refit.fit([TRAIN], progress=False)
    found = refit.optimize_prior_precision(progress=False)
    assert found == refit.optimize_prior_precision(Evidence(), progress=False)
    assert found != refit.optimize_prior_precision(LeaveOneOut(), progress=False)


def test_what_a_way_of_tuning_would_not_look_at_is_refused() -> None:
    la = LaplaceLoRA(tiny.tiny_llama(), Answers(tiny.ANSWERS), structure="kfac").fit([TRAIN], progress=False)
    for arguments in ({"loader": [TRAIN]}, {"grid": [1.0, 2.0]}, {"link_approx": "mc"}):
        with pytest.raises(TypeError):
            Evidence(**arguments)
    for per in ("layer", "scalar"):
        with pytest.raises(ValueError, match="per must be one of"):
            HeldOut([TRAIN], per=per)
    with pytest.raises(ValueError, match="per must be one of"):
        Evidence(per="ab")
    with pytest.raises(ValueError, match="n_samples has no effect on link_approx='probit'"):
        la.optimize_prior_precision(HeldOut([TRAIN], n_samples=5), progress=False)
    with pytest.raises(ValueError, match=r"tuning must be one of .*leave_one_out"):
        la.optimize_prior_precision("val_nll")
    with pytest.raises(ValueError, match=r"needs arguments: pass HeldOut\(\.\.\)"):
        la.optimize_prior_precision("held_out")
