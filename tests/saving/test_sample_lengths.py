"""Adapters from the posterior: how long they are, what is refused, the span of the data, how linear the model is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from laplace_lora_fast import Answers, LaplaceLoRA, Rows, Tokens
from laplace_lora_fast.sampling.lengths import gaps
from tests import oracle, tiny
from tests.contracts.test_tasks import TASKS, data
from tests.oracle import assert_close

EXACT = Rows(columns=1 << 20)
ANSWERS = Answers(tiny.ANSWERS)


def fitted(structure=EXACT, prior_precision=1.0, **options) -> LaplaceLoRA:
    la = LaplaceLoRA(
        tiny.tiny_llama(**options), ANSWERS, structure=structure, prior_precision=prior_precision
    )
    return la.fit([tiny.batch(4)], progress=False)


def flat(draws: list[Tensor], la: LaplaceLoRA) -> Tensor:
    """Steps [n, P], as parameters are, layer by layer."""
    means = la.posterior.curvature.means
    steps = [draw - mean for draw, mean in zip(draws, means, strict=True)]
    return torch.cat([(s if i % 2 == 0 else s.mT).flatten(1) for i, s in enumerate(steps)], 1)


def contrasts(la: LaplaceLoRA, batch: tiny.Batch) -> Tensor:
    """Rows [N (C - 1), P] of the contrasts of all examples, by autograd."""
    J = torch.cat(list(oracle.jacobians(la.model, batch, oracle.answer_logits).values()), 2)
    return (J[:, 1:] - J[:, :1]).flatten(0, 1)


@pytest.mark.parametrize("prior_precision", [0.5, {"A": 0.3, "B": 2.0}], ids=str)
def test_samples_of_the_datas_directions(prior_precision) -> None:
    """They lie in Lambda^-1 times the span of the rows, and functions of the training data vary as under all of it."""
    la, n = fitted(prior_precision=prior_precision), 20_000
    for parameter in la.model.parameters():
        parameter.requires_grad_(True)
    rows = contrasts(la, tiny.batch(4))
    steps = flat(la.posterior.sample(n, torch.Generator().manual_seed(0), "data"), la)
    sides = (
        {"A": prior_precision, "B": prior_precision}
        if isinstance(prior_precision, float)
        else prior_precision
    )
    lam = torch.cat(
        [
            torch.full((w.numel(),), sides[s])
            for layer in la.layers
            for s, w in (("A", layer.weights.A), ("B", layer.weights.B))
        ]
    ).double()
    basis = torch.linalg.qr((rows / lam).mT).Q
    some = steps[:5]
    assert_close(some @ basis @ basis.mT, some, 1e-6)
    found = (steps @ rows.mT).mT.cov()
    _, cov = la.logit_distribution(tiny.batch(4))
    L = la.likelihood.functions(3).double()
    for example in range(4):
        place = slice(2 * example, 2 * example + 2)
        expected = L.mT @ cov[example] @ L
        assert (found[place, place] - expected).abs().max() < 0.06 * expected.abs().max()
    whole = flat(la.posterior.sample(50, torch.Generator().manual_seed(0)), la)
    assert steps[:50].norm(dim=1).mean() < 0.2 * whole.norm(dim=1).mean()


def test_span_samples_of_sketched_rows_stay_in_the_sketch() -> None:
    la = fitted(Rows(columns=8))
    curvature = la.posterior.curvature
    samples = la.posterior.sample(3, torch.Generator().manual_seed(0), "data")
    for projection, sample, mean in zip(curvature.projections, samples, curvature.means, strict=True):
        basis = torch.linalg.qr(projection.double()).Q
        step = sample - mean
        assert_close(step @ basis @ basis.mT, step, 1e-9)


def test_what_is_too_long_is_refused_before_anything_is_written(tmp_path) -> None:
    la = fitted()
    theta = math.sqrt(sum(float(m.square().sum()) for m in la.posterior.curvature.means))
    draws = flat(la.posterior.sample(2, torch.Generator().manual_seed(la.seed)), la)
    longest = float(draws.norm(dim=1).max())
    with pytest.raises(ValueError, match="times its own length") as caught:
        la.sample_adapters(tmp_path / "samples", 2)
    message = str(caught.value)
    assert f"by {longest:.4g}, {longest / theta:.3g} times its own length {theta:.4g}" in message
    assert "directions='data'" in message
    assert not (tmp_path / "samples").exists()
    needed = float(message.split("prior_precision=")[1].split()[0])
    P = draws.shape[1]
    assert needed == pytest.approx(P / theta**2, rel=0.01)
    written = la.sample_adapters(tmp_path / "larger", 3, prior_precision=1.1 * needed)
    assert written.lengths.ratio <= 1
    forced = la.sample_adapters(tmp_path / "forced", 2, force=True)
    assert forced.lengths.ratio == pytest.approx(longest / theta)
    assert forced.gaps is None
    assert [path.name for path in forced] == ["sample-000", "sample-001"]


def test_prior_precisions_of_several_numbers_are_scaled(tmp_path) -> None:
    la = fitted(prior_precision={"A": 1.0, "B": 1.0})
    with pytest.raises(ValueError, match=r"pass prior precisions \d[\d.]* times as large, directions='data'"):
        la.sample_adapters(tmp_path / "samples", 2)


@pytest.mark.parametrize("name", ["Answers", "Options", "Regression", "Preference"])
def test_gaps_are_those_of_autograd(name: str) -> None:
    """A model whose weights are moved by hand, and its first-order expansion by finite differences."""
    make, task = TASKS[name]
    batch = data(task, 1)
    la = LaplaceLoRA(make(), task, structure=EXACT, prior_precision=300.0).fit([data(task)], progress=False)
    samples = la.sample(2, prior_precision=300.0)
    found = gaps(samples, [batch])
    plain = samples.still(samples).outputs(batch, linearised=False)[0]
    weights = [la.model.get_parameter(n) for layer in la.layers for n in layer.parameter_names.values()]

    def outputs(scale: float, sample: int) -> Tensor:
        kept = [w.detach().clone() for w in weights]
        with torch.no_grad():
            for i, (w, delta) in enumerate(zip(weights, samples.deltas, strict=True)):
                step = delta[sample] if i % 2 == 0 else delta[sample].mT
                w += scale * step
        moved = samples.still(samples)
        moved._unchanged = __import__("contextlib").nullcontext
        result = moved.outputs(batch, linearised=False)[0]
        with torch.no_grad():
            for w, old in zip(weights, kept, strict=True):
                w.copy_(old)
        return result

    for sample in range(2):
        linear = (outputs(1e-5, sample) - outputs(-1e-5, sample)) / 2e-5
        off = outputs(1.0, sample) - plain - linear
        if off.shape[1] > 1:
            off, linear = (each - each.mean(1, keepdim=True) for each in (off, linear))
        assert float(found[sample]) == pytest.approx(float(off.abs().sum() / linear.abs().sum()), rel=1e-4)


def test_gaps_vanish_with_the_samples_lengths_and_are_printed(tmp_path, capsys) -> None:
    la = fitted()
    near, far = (
        la.sample_adapters(tmp_path / str(p), 2, prior_precision=p, check=[tiny.batch(3)], force=True)
        for p in (1e8, 1.0)
    )
    assert near.gaps.max() < 0.02 < far.gaps.min()
    shown = capsys.readouterr().out
    assert near.report in shown
    assert (
        f"sample-001: {float(near.lengths.steps[1]):.4g} from the adapter, gap {float(near.gaps[1]):.3f}"
        in shown
    )


def test_what_has_no_samples_of_this_kind(tmp_path) -> None:
    with pytest.raises(
        ValueError, match=r"directions='data' needs the rows of the training data: fit with Rows\(\)"
    ):
        fitted("kfac").sample_adapters(tmp_path, 1, directions="data")
    with pytest.raises(ValueError, match="directions must be one of"):
        fitted().sample_adapters(tmp_path, 1, directions="span")
    refit = fitted(Rows(refit=True))
    for directions in ("all", "data"):
        with pytest.raises(ValueError, match=r"fit with Rows\(\)"):
            refit.sample_adapters(tmp_path, 1, directions=directions)
    la = LaplaceLoRA(TASKS["Tokens"][0](), Tokens()).fit([data(Tokens())], progress=False)
    with pytest.raises(ValueError, match="leave check out"):
        la.sample_adapters(tmp_path, 1, check=[data(Tokens())], force=True)
