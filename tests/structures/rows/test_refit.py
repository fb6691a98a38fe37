"""The refitted linearised model against Newton over all weights, and leave-one-out against leaving out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from bench.measure import peak_bytes
from laplace_lora_fast import (
    Classes,
    Evidence,
    HeldOut,
    InvalidBatchError,
    LaplaceLoRA,
    LaplaceWarning,
    NotFittedError,
    NumericalError,
    Regression,
    Rows,
)
from laplace_lora_fast.likelihoods import Categorical
from laplace_lora_fast.model.tap import Tap
from laplace_lora_fast.structures.rows.layout import Layout
from laplace_lora_fast.structures.rows.refits.left_out import leave_one_out
from laplace_lora_fast.structures.rows.refits.mode import Observations, newton
from tests import oracle, tiny
from tests.oracle import assert_close

TEST = tiny.batch(3, length=5, seed=2, labels=False, padding="right")
PRIORS = {"all": 0.7, "side": {"A": 0.3, "B": 2.0}}
REFIT = Rows(refit=True)


def train(classes: int, n: int = 7) -> tiny.Batch:
    return tiny.batch(n, length=6, seed=1, padding="right", classes=classes)


def learnt(model: nn.Module, classes: int) -> tiny.Batch:
    """Labels as the model would have them, but one."""
    data = train(classes, 12)
    logits = [oracle.class_logits(model, single) for single in oracle.examples(data)]
    labels = torch.stack(logits).argmax(1)
    labels[0] = (labels[0] + 1) % classes
    return data | {"labels": labels}


def refitted(
    classes: int, model: nn.Module | None = None, noise: float = 1.0, **options: object
) -> LaplaceLoRA:
    """`classes` = 0 is a regression."""
    model = model or tiny.tiny_llama_classifier(classes or 1)
    la = LaplaceLoRA(model, Classes() if classes else Regression(noise), structure=REFIT, **options)
    return la.fit(tiny.split(train(classes), 3), progress=False)


@dataclass
class DenseRefit:
    """The linearised model f = m + J w over all weights w ~ N(0, Lambda^-1), refitted by Newton in the weights."""

    prior_logits: Tensor  # of the test examples
    jacobian: Tensor  # [N, C, P] of the test examples
    weights: Tensor
    precision: Tensor
    log_evidence: float

    @property
    def mean(self) -> Tensor:
        return self.prior_logits + self.jacobian @ self.weights

    @property
    def covariance(self) -> Tensor:
        return self.jacobian @ torch.linalg.inv(self.precision) @ self.jacobian.mT


def logits_without_adapter(model: nn.Module, data: tiny.Batch) -> Tensor:
    with model.disable_adapter(), torch.no_grad():
        return torch.stack([oracle.class_logits(model, single) for single in oracle.examples(data)])


def dense_refit(la: LaplaceLoRA, data: tiny.Batch, sigma: float = 1.0) -> DenseRefit:
    model = la.model
    jacobian, test = (
        torch.cat(list(oracle.jacobians(model, each, oracle.class_logits).values()), 2)
        for each in (data, TEST)
    )
    lams = dict(zip(la.posterior.curvature.names, la.posterior.prior_precision.tolist(), strict=True))
    sizes = oracle.jacobians(model, TEST, oracle.class_logits)
    diagonal = torch.cat([torch.full((j.shape[2],), lams[key], dtype=j.dtype) for key, j in sizes.items()])
    prior, labels = logits_without_adapter(model, data), data["labels"]
    classification = la.likelihood.name == "classification"

    def loss(w: Tensor) -> Tensor:
        f = prior + jacobian @ w
        if classification:
            misfit = nn.functional.cross_entropy(f, labels, reduction="sum")
        else:
            misfit = -torch.distributions.Normal(f, sigma).log_prob(labels.view_as(f)).sum()
        return misfit + 0.5 * (diagonal * w * w).sum()

    w = torch.zeros_like(diagonal)
    for _ in range(30):
        step = torch.linalg.solve(torch.func.hessian(loss)(w), torch.func.grad(loss)(w))
        while loss(w - step) > loss(w) + 1e-9:
            step = step / 2
        w = w - step
    hessian = torch.func.hessian(loss)(w)
    log_det = torch.linalg.slogdet(hessian).logabsdet - diagonal.log().sum()
    return DenseRefit(logits_without_adapter(model, TEST), test, w, hessian, float(-loss(w) - 0.5 * log_det))


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_refit_equals_the_optimum_over_all_weights(classes: int, prior: str) -> None:
    la = refitted(classes, prior_precision=PRIORS[prior])
    expected = dense_refit(la, train(classes))
    mean, cov = la.logit_distribution(TEST)
    assert_close(mean, expected.mean, 1e-8)
    assert_close(cov, expected.covariance, 1e-8)
    assert la.log_marginal_likelihood().item() == pytest.approx(expected.log_evidence, rel=1e-8)
    assert (
        mean
        - LaplaceLoRA(la.model, Classes()).fit([train(classes)], progress=False).logit_distribution(TEST)[0]
    ).abs().max() > 0.1


def test_refit_of_a_regression_equals_the_optimum_over_all_weights() -> None:
    la = refitted(0, prior_precision=0.7, noise=0.6)
    expected = dense_refit(la, train(0), sigma=0.6)
    mean, cov = la.logit_distribution(TEST)
    assert_close(mean, expected.mean, 1e-8)
    assert_close(cov, expected.covariance, 1e-8)
    assert la.log_marginal_likelihood().item() == pytest.approx(expected.log_evidence, rel=1e-8)
    assert_close(la.predictive_variance(TEST), cov.diagonal(dim1=1, dim2=2) + 0.36, 1e-12)


def test_several_priors_are_refitted_each() -> None:
    la = refitted(3)
    many = [0.1, {"A": 1.0, "B": 3.0}, 30.0]
    means, covs = la.logit_distribution(TEST, prior_precision=many)
    probs = la.predict(TEST, prior_precision=many)
    assert (means[0] - means[2]).abs().max() > 0.1
    for index, value in enumerate(many):
        la.prior_precision = value
        mean, cov = la.logit_distribution(TEST)
        assert_close(means[index], mean, 1e-9)
        assert_close(covs[index], cov, 1e-9)
        assert_close(probs[index], la.predict(TEST), 1e-9)


def test_without_data_it_is_the_model_without_its_adapter() -> None:
    la = refitted(3, prior_precision=1e12)
    mean, cov = la.logit_distribution(TEST)
    assert_close(mean, logits_without_adapter(la.model, TEST), 1e-6)
    assert cov.abs().max() < 1e-9


def test_leave_one_out_of_a_regression_is_exact() -> None:
    la, data = refitted(0, prior_precision=0.7, noise=0.6), train(0)
    ((examples, mean, cov, targets),) = la.posterior.curvature.leave_one_out(la.posterior.prior_precision)
    assert examples.tolist() == list(range(7))
    assert torch.equal(targets[:, 0], data["labels"])
    for n in range(len(mean)):
        rest = {key: torch.cat([value[:n], value[n + 1 :]]) for key, value in data.items()}
        alone = {key: value[n : n + 1] for key, value in data.items()}
        other = LaplaceLoRA(la.model, la.task, structure=REFIT, prior_precision=0.7)
        other.fit([rest], progress=False)
        expected_mean, expected_cov = other.logit_distribution(alone)
        assert_close(mean[n], expected_mean[0], 1e-8)
        assert_close(cov[n], expected_cov[0], 1e-8)


def observations(prior: Tensor, targets: Tensor) -> Observations:
    """Of a classification, prior [N, C - 1]."""
    n, k = prior.shape
    return Observations(Layout(torch.full((n,), k)), Categorical(), [prior], [targets])


def test_refit_converges_where_the_prior_says_nothing() -> None:
    """Outputs of 30 and a kernel of 1e10: f is known to rounding only, and that is enough."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn((30, 60), generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 2, (30,), generator=generator)
    observed = observations(torch.zeros(30, 1, dtype=torch.float64), targets)
    for scale in (1e6, 1e8, 1e10):
        kernel = scale * features @ features.mT
        mode = newton(kernel, observed)
        assert_close(mode.alpha, observed.gradient(mode.functions)[0][:, 0], 1e-5)  # stationary
        assert (mode.functions > 0).equal(targets.bool())


@pytest.mark.parametrize("classes", [2, 4])
def test_leave_one_out_of_a_classification_is_close_to_leaving_out(classes: int) -> None:
    """Random features: the second-order formula against 30 refits, and far closer to them than the fit itself."""
    generator = torch.Generator().manual_seed(0)
    n, k = 30, classes - 1

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    features = noise(n * k, 20)
    kernel = features @ features.mT / 10
    observed = observations(noise(n, k), torch.randint(0, classes, (n,), generator=generator))
    mode = newton(kernel, observed)
    (prior,), (targets,) = observed.prior, observed.targets
    ((mean, cov),) = leave_one_out(kernel, observed, mode)
    exact_mean, exact_cov = torch.zeros_like(mean), torch.zeros_like(cov)
    for left_out in range(n):
        keep = torch.arange(n) != left_out
        rows = keep.repeat_interleave(k)
        inner, cross = kernel[rows][:, rows], kernel[~rows][:, rows]
        other = newton(inner, observations(prior[keep], targets[keep]))
        weights = torch.block_diag(*(other.roots.blocks[0] @ other.roots.blocks[0].mT))
        exact_mean[left_out] = prior[left_out] + cross @ other.alpha
        inverse = torch.linalg.inv(torch.eye(len(inner)).double() + weights @ inner) @ weights
        exact_cov[left_out] = kernel[~rows][:, ~rows] - cross @ inverse @ cross.mT
    error, naive = (mean - exact_mean).norm(), (mode.functions.view(n, k) - exact_mean).norm()
    assert error < 0.15 * naive
    assert (cov - exact_cov).norm() < 0.15 * exact_cov.norm()


def test_evidence_is_largest_where_it_says() -> None:
    model = tiny.tiny_llama_classifier(3)
    la = LaplaceLoRA(model, Classes(), structure=REFIT).fit([learnt(model, 3)], progress=False)
    best = la.optimize_prior_precision("evidence")
    assert isinstance(best, float)
    top, step = la.log_marginal_likelihood().item(), 1e-4
    up, down = (la.log_marginal_likelihood(best * math.exp(s)).item() for s in (step, -step))
    assert abs(up - down) / (2 * step) < 1e-6
    assert max(la.log_marginal_likelihood(best * f).item() for f in (0.5, 2.0)) < top


def test_held_out_tuning_refits_at_each_value() -> None:
    la, val, grid = refitted(2), tiny.batch(6, seed=7, padding="right", classes=2), [0.03, 0.3, 3.0, 30.0]
    nll = []
    for value in grid:
        probs = la.predict(val, prior_precision=value)
        nll.append(-probs[torch.arange(6), val["labels"]].log().mean().item())
    tuning = HeldOut([val], grid=grid)
    expected = grid[min(range(4), key=nll.__getitem__)]
    if expected in (grid[0], grid[-1]):
        with pytest.warns(LaplaceWarning, match="edge"):
            assert la.optimize_prior_precision(tuning, progress=False) == expected
    else:
        assert la.optimize_prior_precision(tuning, progress=False) == expected


@pytest.mark.filterwarnings("ignore::laplace_lora_fast.errors.LaplaceWarning")  # the labels are random
@pytest.mark.parametrize("refit", [False, True])
def test_held_out_tuning_holds_one_solution_at_a_time(refit: bool) -> None:
    """Each is an R x R matrix, and a grid has 101 values, of two prior precisions 10201."""
    model, rows = tiny.tiny_llama_classifier(2), 96
    la = LaplaceLoRA(model, Classes(), structure=Rows(refit=refit)).fit([train(2, rows)], progress=False)
    per, held_out = "all" if refit else "side", [train(2, 4)]

    def peak(n: int) -> int:
        grid = torch.logspace(-1, 1, n).tolist()
        tuning = HeldOut(held_out, per=per, grid=grid)
        return peak_bytes(lambda: la.optimize_prior_precision(tuning, progress=False))

    peak(2)
    assert peak(30) - peak(3) < 5 * rows**2 * 8


def test_batches_padding_and_checkpointing_make_no_difference() -> None:
    model, data = tiny.tiny_llama_classifier(3), train(3)
    reference = refitted(3, model)
    expected = reference.logit_distribution(TEST)
    for batches in (tiny.split(data, 7), tiny.split(data, 2)[::-1], [tiny.repad(data, "right", 11)]):
        again = LaplaceLoRA(model, Classes(), structure=REFIT)
        got = again.fit(batches, progress=False).logit_distribution(TEST)
        assert_close(got[0], expected[0], 1e-9)
        assert_close(got[1], expected[1], 1e-9)
    for reentrant in (True, False):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        got = refitted(3, model).logit_distribution(TEST)
        assert_close(got[0], expected[0], 1e-9)
        assert_close(got[1], expected[1], 1e-9)


def test_round_trip(tmp_path: object) -> None:
    la = refitted(3, prior_precision=0.4)
    la.save(tmp_path)
    again = LaplaceLoRA.load(tmp_path, la.model)
    assert torch.equal(again.predict(TEST), la.predict(TEST))
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())
    ((mine,), (theirs,)) = (
        x.posterior.curvature.leave_one_out(la.posterior.prior_precision) for x in (la, again)
    )
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert "refit=True" in la.summary()


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.tiny_llama_classifier(3)
    before = [len(module._forward_hooks) for module in model.modules()]
    refitted(3, model).predict(TEST)
    with pytest.raises(InvalidBatchError):
        refitted(3, model).predict({"input_ids": torch.zeros(0, 5, dtype=torch.long)})
    assert [len(module._forward_hooks) for module in model.modules()] == before


def test_biases_of_lora_b_stay() -> None:
    """They are not in the posterior, so that the prior mean has them."""
    model = tiny.tiny_llama_classifier(3, lora_bias=True)
    la = refitted(3, model, prior_precision=1e12)
    mean, _ = la.logit_distribution(TEST)
    without = logits_without_adapter(model, TEST)
    with torch.no_grad():
        for layer in la.layers:
            for name in layer.parameter_names.values():
                model.get_parameter(name).zero_()
    expected = torch.stack([oracle.class_logits(model, single) for single in oracle.examples(TEST)])
    assert_close(mean, expected.detach(), 1e-6)
    assert (expected - without).abs().max() > 0.1


def test_layers_left_out_keep_their_adapter() -> None:
    """With no prior uncertainty to speak of, the mean is the model with the other layers' adapters on."""
    model = tiny.tiny_llama_classifier(3)
    la = LaplaceLoRA(model, Classes(), structure=REFIT, layers="last", prior_precision=1e12)
    mean, _ = la.fit([train(3)], progress=False).logit_distribution(TEST)
    for layer in la.layers:
        with torch.no_grad():
            layer.module.lora_B["default"].weight.zero_()
    expected = torch.stack([oracle.class_logits(model, single) for single in oracle.examples(TEST)])
    assert_close(mean, expected.detach(), 1e-6)
    assert (expected - logits_without_adapter(model, TEST)).abs().max() > 0.1


def test_a_model_that_overflows_without_its_adapter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tap, "prior_u", lambda self, inputs: torch.full((3, 3), torch.nan))
    la = LaplaceLoRA(tiny.tiny_llama_classifier(3), Classes(), structure=REFIT)
    with pytest.raises(NumericalError, match="without its adapter"):
        la.fit([train(3, 3)], progress=False)
    with pytest.raises(NotFittedError):
        la.predict(TEST)


def test_what_does_not_go_together_is_refused() -> None:
    model = tiny.tiny_llama_classifier(3)
    for fisher in ("mc", "empirical"):
        with pytest.raises(ValueError, match="refit=True needs fisher='exact'"):
            Rows(refit=True, fisher=fisher)
    with pytest.raises(ValueError, match="refit must be True or False"):
        Rows(refit="median")
    trained = {name: weight for name, weight in model.state_dict().items() if "lora_" in name}
    with pytest.raises(ValueError, match="lora_B = 0"):
        LaplaceLoRA(model, Classes(), structure=REFIT, prior_mean=trained)
    la = LaplaceLoRA(model, Classes(), structure=REFIT)
    with pytest.raises(InvalidBatchError, match="labels"):
        la.fit([{k: v for k, v in train(3).items() if k != "labels"}], progress=False)
    la.fit([train(3)], progress=False)
    with pytest.raises(ValueError, match=r"fit with Rows\(\)"):
        la.sample_adapters("nowhere", 1)
    with pytest.raises(ValueError, match=r"Evidence\(per='all'\)"):
        la.optimize_prior_precision(Evidence(per="side"))
    plain = LaplaceLoRA(model, Classes(), structure="rows").fit([train(3)], progress=False)
    with pytest.raises(ValueError, match=r"LeaveOneOut needs structure=Rows\(refit=True\)"):
        plain.optimize_prior_precision("leave_one_out")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_adapters_whose_start_was_taken_out_of_the_base_model(init: str) -> None:
    """Without such an adapter the model is a residual, not the pre-trained model."""
    model = tiny.tiny_llama_classifier(3, torch.float32, init_lora_weights=init)
    with pytest.raises(ValueError, match=rf"refit=True .*init_lora_weights='{init}'.*Rows\(\)"):
        LaplaceLoRA(model, Classes(), structure=REFIT)
    LaplaceLoRA(model, Classes()).fit([train(3)], progress=False)
    plain = tiny.tiny_llama_classifier(3)
    la = LaplaceLoRA(plain, Classes(), structure=REFIT).fit([train(3)], progress=False)
    plain.peft_config["default"].init_lora_weights = init
    with pytest.raises(ValueError, match="refit=True"):
        la.fit([train(3)], progress=False)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_starts_that_leave_the_base_model_as_it_was(init: bool | str) -> None:
    model = tiny.tiny_llama_classifier(3, init_lora_weights=init)
    LaplaceLoRA(model, Classes(), structure=REFIT).fit([train(3)], progress=False)
