"""Covariance, evidence and predictive against brute force with dense kron matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from laplace_lora_fast import KFAC, Answers, Classes, InvalidBatchError, LaplaceLoRA, Regression, Rows
from laplace_lora_fast.prediction import distribution
from tests import oracle, tiny
from tests.oracle import assert_close

TRAIN = tiny.batch(9, length=6, seed=1)
TEST = tiny.batch(4, length=5, seed=2, labels=False, padding="right")
LAYERS = "base_model.model.model.layers."
PRIORS = {
    "all": 0.7,
    "side": {"A": 0.3, "B": 2.0},
    "layer": {f"{LAYERS}{i}.self_attn.{p}_proj": 0.5 + i + (p == "v") for i in (0, 1) for p in "qv"},
}


def fitted(model: torch.nn.Module, structure: KFAC | str = "kfac", **options: object) -> LaplaceLoRA:
    la = LaplaceLoRA(model, Answers(tiny.ANSWERS), structure=structure, **options)
    return la.fit(tiny.split(TRAIN, 4), progress=False)


def kron_precisions(la: LaplaceLoRA) -> dict[tuple[str, str], Tensor]:
    """H + lambda I of every weight from the dense factors, vec row-major."""
    lams = dict(zip(la.posterior.curvature.names, la.posterior.prior_precision.tolist(), strict=True))
    result = {}
    for name, factors in la.factors.items():
        for side in "AB":
            weight = getattr(factors, side)
            h = torch.kron(weight.gradient_factor, weight.input_factor)
            result[name, side] = h + lams[name, side] * torch.eye(len(h), dtype=h.dtype)
    return result


def brute_force_covariance(la: LaplaceLoRA, model: torch.nn.Module, logits_of: oracle.Logits) -> Tensor:
    precisions = kron_precisions(la)
    jacobians = oracle.jacobians(model, TEST, logits_of)
    return sum(j @ torch.linalg.inv(precisions[key]) @ j.mT for key, j in jacobians.items())


@pytest.mark.parametrize("mode", ["expand", "reduce"])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("rank", [None, 1, 5])
def test_logit_covariance_equals_brute_force(mode: str, prior: str, rank: int | None) -> None:
    """Full spectrum, exact low rank (few rows), and rank k with its tail."""
    model = tiny.tiny_llama()
    la = fitted(model, KFAC(tokens=mode, rank=rank), prior_precision=PRIORS[prior])
    mean, cov = la.logit_distribution(TEST)
    assert_close(cov, brute_force_covariance(la, model, oracle.answer_logits), 1e-8)
    logits = torch.stack([oracle.answer_logits(model, single) for single in oracle.examples(TEST)])
    assert_close(mean, logits.detach(), 1e-10)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_contrasts_equal_brute_force(classes: int) -> None:
    model = tiny.tiny_llama_classifier(classes)
    la = LaplaceLoRA(model, Classes(), structure="kfac", prior_precision=0.4)
    la.fit([tiny.batch(8, classes=classes, seed=1, padding="right")], progress=False)
    cov = brute_force_covariance(la, model, oracle.class_logits)
    contrast = torch.cat([-torch.ones(1, classes - 1), torch.eye(classes - 1)]).double()
    with la._linearised(1.0) as linearised:
        (block,) = distribution(linearised, la.posterior.prior_precision[:, None], [TEST])
    mean, found = block.mean, block.cov[0]
    assert_close(found, contrast.mT @ cov @ contrast, 1e-8)
    logits = torch.stack([oracle.class_logits(model, single) for single in oracle.examples(TEST)]).detach()
    assert_close(mean, logits[:, 1:] - logits[:, :1], 1e-10)


def test_adapted_head_equals_brute_force() -> None:
    """Rows of lora_B outside the answers have no curvature and no Jacobian: they do not count."""
    model = tiny.tiny_llama(targets=("q_proj", "lm_head"))
    la = fitted(model)
    jacobians = oracle.jacobians(model, TEST, oracle.answer_logits)
    head = ("base_model.model.lm_head", "B")
    n, classes, _ = jacobians[head].shape
    by_row = jacobians[head].view(n, classes, tiny.VOCAB, -1)
    jacobians[head] = by_row[:, :, list(tiny.ANSWERS)].flatten(2)
    precisions = kron_precisions(la)
    expected = sum(j @ torch.linalg.inv(precisions[key]) @ j.mT for key, j in jacobians.items())
    assert_close(la.logit_distribution(TEST)[1], expected, 1e-8)


def test_one_example_of_one_token_gives_the_exact_ggn_laplace() -> None:
    """KFAC of each weight is then exact; compare with J (lambda I + J^T Lambda J)^-1 J^T by blocks."""
    model = tiny.tiny_llama(layers=1, targets=("down_proj",))
    one = {"input_ids": torch.tensor([[9]]), "labels": torch.tensor([1])}
    la = LaplaceLoRA(model, Answers(tiny.ANSWERS), structure="kfac", prior_precision=0.3)
    la.fit([one], progress=False)
    hessian = oracle.softmax_hessian(oracle.answer_logits(model, one).detach())
    train = oracle.jacobians(model, one, oracle.answer_logits)
    test = oracle.jacobians(model, TEST, oracle.answer_logits)
    expected = 0
    for key, j in train.items():
        precision = j[0].mT @ hessian @ j[0] + 0.3 * torch.eye(j.shape[2], dtype=j.dtype)
        expected = expected + test[key] @ torch.linalg.inv(precision) @ test[key].mT
    assert_close(la.logit_distribution(TEST)[1], expected, 1e-8)


@pytest.mark.parametrize("rank", [None, 2])
def test_dense_covariance_of_a_weight(rank: int | None) -> None:
    model = tiny.tiny_llama()
    la = fitted(model, KFAC(rank=rank))
    for (name, side), precision in kron_precisions(la).items():
        assert_close(la.posterior.covariance(name, side), torch.linalg.inv(precision), 1e-8)
    with pytest.raises(KeyError, match="nowhere"):
        la.posterior.covariance("nowhere", "A")


@pytest.mark.parametrize("power", [-1.0, -0.5, 0.5])
@pytest.mark.parametrize("rank", [None, 2])
def test_powers_of_the_precision(power: float, rank: int | None) -> None:
    la = fitted(tiny.tiny_llama(), KFAC(rank=rank))
    precisions = kron_precisions(la)
    curvature, lams = la.posterior.curvature, la.posterior.prior_precision.tolist()
    for name, block, lam in zip(curvature.names, curvature.blocks, lams, strict=True):
        weights = torch.randn(2, *block.mean.shape, dtype=torch.float64)
        found = block.apply_power(weights, power, lam)
        values, vectors = torch.linalg.eigh(precisions[name])
        matrix = (vectors * values**power) @ vectors.mT
        flat = weights if name[1] == "A" else weights.mT  # row-major in the weight's own orientation
        expected = (flat.flatten(1) @ matrix).view(flat.shape)
        assert_close(found, expected if name[1] == "A" else expected.mT, 1e-8)


@pytest.mark.parametrize("rank", [None, 1, 5])
@pytest.mark.parametrize("prior", PRIORS)
def test_log_marginal_likelihood_equals_brute_force_slogdet(rank: int | None, prior: str) -> None:
    model = tiny.tiny_llama()
    la = fitted(model, KFAC(rank=rank), prior_precision=PRIORS[prior])
    expected = 0.0
    for single in oracle.examples(TRAIN):
        expected += oracle.answer_logits(model, single).log_softmax(-1)[single["labels"][0]].item()
    lams = dict(zip(la.posterior.curvature.names, la.posterior.prior_precision.tolist(), strict=True))
    for (name, side), precision in kron_precisions(la).items():
        lam, theta = (
            lams[name, side],
            getattr(oracle.lora_modules(model)[name], f"lora_{side}")["default"].weight,
        )
        log_det = torch.linalg.slogdet(precision).logabsdet.item()
        expected -= 0.5 * (lam * theta.square().sum().item() + log_det - theta.numel() * math.log(lam))
    assert la.log_marginal_likelihood().item() == pytest.approx(expected, rel=1e-8)
    assert la.log_marginal_likelihood(2.0).item() == pytest.approx(_with_prior(la, 2.0), rel=1e-12)


def _with_prior(la: LaplaceLoRA, value: float) -> float:
    before, la.prior_precision = la.prior_precision, value
    evidence = la.log_marginal_likelihood().item()
    la.prior_precision = before
    return evidence


def test_effective_parameters_are_the_trace_of_the_determined_share() -> None:
    la = fitted(tiny.tiny_llama(), prior_precision=0.2)
    expected = [
        torch.trace(torch.eye(len(p), dtype=p.dtype) - 0.2 * torch.linalg.inv(p))
        for p in kron_precisions(la).values()
    ]
    assert_close(la.posterior.effective_parameters(), torch.stack(expected), 1e-8)


def test_several_priors_in_one_pass() -> None:
    model = tiny.tiny_llama()
    la = fitted(model)
    many = [0.1, {"A": 1.0, "B": 3.0}, 30.0]
    _, covs = la.logit_distribution(TEST, prior_precision=many)
    probs = la.predict(TEST, prior_precision=many)
    for index, value in enumerate(many):
        assert_close(covs[index], la.logit_distribution(TEST, prior_precision=value)[1], 1e-12)
        la.prior_precision = value
        assert_close(covs[index], la.logit_distribution(TEST)[1], 1e-12)
        assert_close(probs[index], la.predict(TEST), 1e-12)


def test_summary_names_layers_and_totals() -> None:
    la = fitted(tiny.tiny_llama(), KFAC(rank=2))
    text = la.summary()
    gamma = la.posterior.effective_parameters().sum().item()
    weights = sum(mean.numel() for mean in la.posterior.curvature.means)
    assert all(f"{layer.name}.lora_{side}" in text for layer in la.layers for side in "AB")
    assert f"{gamma:.1f} of {weights} parameters" in text


@pytest.mark.parametrize("link", ["probit", "mc", "bridge", "map"])
def test_a_list_of_priors_is_an_axis_of_every_prediction(link: str) -> None:
    la = LaplaceLoRA(tiny.tiny_llama_classifier(3), Classes(), structure="kfac")
    la.fit([tiny.batch(5)], progress=False)
    tried = [0.5, 2.0]
    many = la.predict(TEST, link_approx=link, prior_precision=tried)
    for probs, value in zip(many, tried, strict=True):
        assert_close(probs, la.predict(TEST, link_approx=link, prior_precision=value), 1e-10)
    for probs, value in zip(many, tried, strict=True):
        found = la.predictions([TEST], link_approx=link, prior_precision=value, progress=False)
        assert_close(found.probs, probs, 1e-10)


@pytest.mark.parametrize("structure", [KFAC(), Rows(refit=True)], ids=str)
def test_a_list_of_priors_is_an_axis_of_a_regression(structure: KFAC | Rows) -> None:
    la = LaplaceLoRA(tiny.tiny_llama_classifier(1), Regression(noise=1.0), structure=structure)
    la.fit([tiny.batch(5, classes=0)], progress=False)
    mean, variance = (of(TEST, prior_precision=[0.5, 2.0]) for of in (la.predict, la.predictive_variance))
    assert mean.shape == variance.shape == (2, len(TEST["input_ids"]), 1)
    for index, value in enumerate((0.5, 2.0)):
        assert_close(mean[index], la.predict(TEST, prior_precision=value), 1e-8)
        assert_close(variance[index], la.predictive_variance(TEST, prior_precision=value), 1e-8)


def test_labels_that_nothing_uses_are_ignored() -> None:
    """Test sets often have -1 there."""
    la = LaplaceLoRA(tiny.tiny_llama_classifier(3), Classes(), structure="kfac")
    la.fit([tiny.batch(5)], progress=False)
    for name in ("labels", "label"):
        batch = TEST | {name: torch.full((len(TEST["input_ids"]),), -1)}
        for link in ("probit", "map"):
            assert torch.equal(la.predict(batch, link_approx=link), la.predict(TEST, link_approx=link))
        assert torch.equal(la.logit_distribution(batch)[1], la.logit_distribution(TEST)[1])
    with pytest.raises(InvalidBatchError, match="leave them out where there are none"):
        la.predictions([batch], progress=False)
    assert la.predictions([TEST], progress=False).labels is None


@pytest.mark.parametrize("refit", [False, True])
def test_a_loader_that_fills_the_same_memory_again(refit: bool) -> None:
    batches = [tiny.batch(4, classes=0, padding=None, seed=seed) for seed in range(3)]

    def reusing() -> Iterator[tiny.Batch]:
        memory = {name: value.clone() for name, value in batches[0].items()}
        for batch in batches:
            for name, value in batch.items():
                memory[name].copy_(value)
            yield memory

    model = tiny.tiny_llama_classifier(1)
    la, other = (LaplaceLoRA(model, Regression(), structure=Rows(refit=refit)) for _ in range(2))
    la.fit(batches, progress=False)
    other.fit(reusing(), progress=False)
    assert torch.equal(other.predict(TEST), la.predict(TEST))
    assert other.sigma_noise == la.sigma_noise
    labels = torch.cat([batch["labels"] for batch in batches])
    assert torch.equal(la.predictions(reusing(), progress=False).labels[:, 0], labels)


class Wide(torch.nn.Module):
    """Large inputs, few examples: a Jacobian lies in the basis of its factor, almost."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = torch.nn.Linear(256, 256, bias=False), torch.nn.Linear(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        return 0.02 * self.head(self.layer(x))


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_single_precision_leaves_the_variance_its_digits_under_weak_priors(structure: str) -> None:
    """What is in the basis does not leave rounding outside of it, for a weak prior to divide."""
    x = 100 * torch.randn(20, 256, dtype=torch.float64)
    found: dict[tuple[torch.dtype, float], tuple[Tensor, Tensor]] = {}
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        model = tiny.adapt(Wide(), targets=("layer",)).to(dtype)
        la = LaplaceLoRA(model, Classes(), structure=structure).fit([{"x": x.to(dtype)}], progress=False)
        grid = [1e-6, 1e-4, 1e-2, 1.0]
        covs = la.logit_distribution({"x": x.to(dtype)}, prior_precision=grid)[1]
        probs = la.predict({"x": x.to(dtype)}, prior_precision=grid)
        found |= {(dtype, lam): (covs[i], probs[i]) for i, lam in enumerate(grid)}
        one = la.logit_distribution({"x": x.to(dtype)}, prior_precision=1e-4)[1]
        assert_close(covs[1], one, 1e-4 if dtype == torch.float32 else 1e-9)
    for lam in grid:
        exact, single = (found[dtype, lam] for dtype in (torch.float64, torch.float32))
        assert torch.linalg.eigvalsh(single[0].double()).min() > 0
        assert_close(single[0].double(), exact[0], 5e-3)  # the factors' own rounding
        assert (single[1].double() - exact[1]).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["B", "A"])
@pytest.mark.parametrize("k", [1, 3])
def test_a_careful_block_is_the_same_block(k: int, name: str) -> None:
    la = fitted(tiny.tiny_llama(), KFAC(rank=3))
    index = la.posterior.curvature.names.index((f"{LAYERS}0.self_attn.q_proj", name))
    block = la.posterior.curvature.blocks[index]
    r, d = block.mean.shape
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    small, large, priors = draw(2, k, 5, r), draw(2, 1, 5, d), torch.tensor([0.1, 2.0], dtype=torch.float64)
    expected = block.variances(small, large, priors)
    assert_close(block.careful().variances(small, large, priors), expected, 1e-12)
    unit = torch.eye(r, dtype=torch.float64).expand(2, 1, -1, -1)
    jacobians = small.mT @ large
    assert_close(block.careful().variances(unit, jacobians, priors), expected, 1e-12)
