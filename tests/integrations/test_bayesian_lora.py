"""bayesian-lora's functions: compat against the package, the default against LaplaceLoRA and brute force."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from laplace_lora_fast import KFAC, Answers, LaplaceLoRA
from laplace_lora_fast.errors import InvalidBatchError, UnsupportedAdapterError
from laplace_lora_fast.integrations import bayesian_lora as ours
from tests import oracle, tiny
from tests.integrations import batched
from tests.oracle import assert_close

LORA = ["lora"]
RANK = 4


def last_column(model: nn.Module, batch: tiny.Batch) -> Tensor:
    """The call bayesian-lora's documentation shows."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
    return model(**inputs).logits[:, -1][:, list(tiny.ANSWERS)]


def last_real(model: nn.Module, batch: tiny.Batch) -> Tensor:
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions).logits
    return out[torch.arange(len(out)), mask.cumsum(1).argmax(1)][:, list(tiny.ANSWERS)]


def rooted(model: nn.Module, batches: list[tiny.Batch], n_kfac: int, threshold: int, **options: object):
    factors = ours.calculate_kronecker_factors(model, last_real, batches, n_kfac, threshold, LORA, **options)
    return ours.cholesky_decompose_small_factors(factors, threshold, "cpu", torch.float64)


class TestCompat:
    """Numbers of the installed package, which draws its labels from the same global generator."""

    data = tiny.batch(8, length=5, padding=None, seed=3)

    @pytest.fixture
    def theirs(self):
        return pytest.importorskip("bayesian_lora", reason="needs bayesian-lora")

    def factors(self, calculate: Callable, model: nn.Module, n_kfac: int | None, **options: object):
        torch.manual_seed(5)
        return calculate(model, last_column, tiny.split(self.data, 4), n_kfac, 10, LORA, **options)

    @pytest.mark.parametrize("n_kfac", [None, 3])
    def test_factors(self, theirs, n_kfac: int | None) -> None:
        model = tiny.tiny_llama(lora_bias=True)
        expected = self.factors(theirs.calculate_kronecker_factors, model, n_kfac)
        found = self.factors(ours.calculate_kronecker_factors, model, n_kfac, compat=True)
        assert list(found) == list(expected)
        for name, pair in expected.items():
            for ours_, theirs_ in zip(found[name], pair, strict=True):
                assert ours_.shape == theirs_.shape
                if ours_.shape[0] != ours_.shape[1]:  # a root is unique up to signs
                    ours_, theirs_ = ours_ @ ours_.mT, theirs_ @ theirs_.mT
                assert_close(ours_, theirs_, 1e-9)

    def test_evidence_jacobian_and_variance(self, theirs) -> None:
        model = tiny.tiny_llama(targets=("q_proj",))
        factors = [
            self.factors(theirs.calculate_kronecker_factors, model, 3),
            self.factors(ours.calculate_kronecker_factors, model, 3, compat=True),
        ]
        expected, found = (
            package.cholesky_decompose_small_factors(f, 10, "cpu", torch.float64, **options)
            for package, f, options in zip((theirs, ours), factors, ({}, {"compat": True}), strict=True)
        )
        s2, likelihood = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-7.0, dtype=torch.float64)
        assert_close(
            ours.model_evidence(model, likelihood, found, RANK, 3, s2, compat=True),
            theirs.model_evidence(model, likelihood, expected, RANK, 3, s2),
            1e-9,
        )
        inputs = {"input_ids": self.data["input_ids"]}

        def callback(output: SimpleNamespace) -> Tensor:
            return output.logits[:, -1][:, list(tiny.ANSWERS)]

        model.eval()
        jacobian, mean = theirs.main.jacobian_mean(model, inputs, output_callback=callback)
        got, got_mean = ours.jacobian_mean(model, inputs, torch.tensor(tiny.ANSWERS)[:, None], compat=True)
        assert list(got) == list(jacobian)
        for name, value in jacobian.items():
            assert_close(got[name], value, 1e-6)
        assert_close(got_mean, mean, 1e-6)
        arguments = (s2, 3, RANK, 3, "cpu")
        assert_close(
            ours.variance(None, got, found, *arguments).float(),
            theirs.variance(SimpleNamespace(**inputs), jacobian, expected, *arguments),
            1e-5,  # accumulated in fp32 there
        )

    def test_stable_cholesky(self, theirs) -> None:
        noise = torch.randn(6, 3, dtype=torch.float64)
        for K in (noise @ noise.mT, torch.zeros(4, 4), torch.eye(3) - 1e-5 * torch.ones(3, 3)):
            assert torch.equal(ours.stable_cholesky(K), theirs.stable_cholesky(K))


@pytest.mark.parametrize("mode", ["expand", "reduce"])
def test_default_factors_are_the_fits(mode: str) -> None:
    """And so, by test_kfac, those of autograd through lora_A and lora_B."""
    model, data = tiny.tiny_llama(targets=("q_proj", "v_proj", "down_proj")), tiny.batch(9, length=6, seed=2)
    la = LaplaceLoRA(model, Answers(tiny.ANSWERS), structure=KFAC(mode)).fit([data], progress=False)
    factors = ours.calculate_kronecker_factors(
        model, last_real, tiny.split(data, 4), target_module_keywords=LORA, kfac=mode
    )
    assert len(factors) == 2 * len(la.factors)
    for name, layer in la.factors.items():
        for side, weight in (("A", layer.A), ("B", layer.B)):
            A, S = factors[f"{name}.lora_{side}.default"]
            assert_close(A, weight.input_factor, 1e-9)
            assert_close(S, weight.gradient_factor, 1e-9)


def test_default_is_laplace_lora_from_factors_to_evidence_and_variance() -> None:
    """With complete low-rank factors. Padding on the right, batches of one and of three."""
    model, data = tiny.tiny_llama(targets=("q_proj",)), tiny.batch(7, length=6, seed=2, padding="right")
    la = LaplaceLoRA(model, Answers(tiny.ANSWERS), structure="kfac", prior_precision=2.5)
    la.fit([data], progress=False)
    factors = rooted(model, tiny.split(data, 3), n_kfac=16, threshold=10)
    s2 = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    likelihood = la.snapshot()[0].log_likelihood
    evidence = ours.model_evidence(
        model, torch.tensor(likelihood, dtype=torch.float64), factors, RANK, 16, s2
    )
    assert_close(evidence.detach(), la.log_marginal_likelihood(), 1e-9)
    evidence.backward()
    assert s2.grad != 0
    for size in (1, 3):
        test = {k: v[:size] for k, v in tiny.batch(3, length=5, seed=8, padding="right").items()}
        mean, cov = la.logit_distribution(test)
        jacobian, found = ours.jacobian_mean(model, test, torch.tensor(tiny.ANSWERS))
        assert_close(found, mean, 1e-9)
        assert_close(ours.variance(None, jacobian, factors, s2.detach(), 3, RANK, 16, "cpu"), cov, 1e-9)


def test_jacobian_is_autograds() -> None:
    model, data = tiny.tiny_llama(), tiny.batch(4, length=6, seed=2, padding="right")
    expected = oracle.jacobians(model, data, oracle.answer_logits)
    jacobian, _ = ours.jacobian_mean(model, data, torch.tensor(tiny.ANSWERS))
    for (name, side), rows in expected.items():
        assert_close(jacobian[f"{name}.lora_{side}.default.weight"].flatten(2), rows, 1e-9)
    classifier = tiny.tiny_llama_classifier(3)
    every, mean = ours.jacobian_mean(classifier, data, is_s2s=True)
    some, logits = ours.jacobian_mean(classifier, data, output_callback=lambda out: out.logits[:, [2, 0]])
    assert_close(logits, mean[:, [2, 0]], 1e-12)
    for name, value in every.items():
        assert_close(some[name], value[:, [2, 0]], 1e-12)


def test_low_rank_roots_are_near_the_best() -> None:
    """200 inputs of dimension 160 against the 10 leading eigenvectors; what is not seen has no column."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(160, 3, bias=False))
    scales = torch.arange(1, 161).float() ** -0.5
    batches = [scales * torch.randn(20, 160, generator=generator) for _ in range(10)]
    (A, S) = ours.calculate_kronecker_factors(model, lambda m, x: m(x), batches, 10, 100)["0"]
    assert A.shape == (160, 10)
    assert S.shape == (3, 3)
    x = torch.cat(batches).double()
    exact = x.mT @ x / 200
    best = torch.linalg.svdvals(exact)[10:].square().sum().sqrt()
    assert torch.linalg.matrix_norm(exact - A @ A.mT) < 1.05 * best
    (A, _) = ours.calculate_kronecker_factors(model, lambda m, x: m(x), [batches[0][:4]], 10, 100)["0"]
    assert (A[:, 4:] == 0).all()


def test_biases_count_unless_excluded() -> None:
    torch.manual_seed(0)
    model, x = batched.network(), torch.randn(7, 5, dtype=torch.float64)
    (A, _) = ours.calculate_kronecker_factors(model, lambda m, x: m(x), [x])["0"]
    with_one = torch.cat([x, torch.ones(7, 1, dtype=torch.float64)], 1)
    assert_close(A, with_one.mT @ with_one / 7, 1e-12)
    (A, _) = ours.calculate_kronecker_factors(model, lambda m, x: m(x), [x], exclude_bias=True)["0"]
    assert_close(A, x.mT @ x / 7, 1e-12)


def test_sampled_labels_converge_and_many_logits_are_sampled() -> None:
    torch.manual_seed(0)
    model, x = batched.network(33), torch.randn(7, 5, dtype=torch.float64)

    def gradient_factor(batches: list[Tensor], **options: object) -> Tensor:
        return ours.calculate_kronecker_factors(model, lambda m, x: m(x), batches, **options)["0"][1]

    exact = gradient_factor([x], fisher="exact")
    sampled = gradient_factor([x] * 600, fisher="mc") / 600
    assert (sampled - exact).norm() / exact.norm() < 0.1
    assert torch.equal(gradient_factor([x]), gradient_factor([x], fisher="mc"))
    assert not torch.equal(gradient_factor([x]), gradient_factor([x], fisher="mc", seed=1))


def test_the_model_is_left_as_it_was() -> None:
    model, data = tiny.tiny_llama(lora_dropout=0.5), tiny.batch(4, length=5)
    model.train()
    first, second = (rooted(model, [data], 2, 10) for _ in range(2))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, pair in first.items():
        for a, b in zip(pair, second[name], strict=True):
            assert torch.equal(a, b)


def test_singular_factors_have_an_exact_root() -> None:
    noise = torch.randn(5, 2, dtype=torch.float64)
    K = noise @ noise.mT
    (L, _) = ours.cholesky_decompose_small_factors({"x": (K, K)}, 10, "cpu", torch.float64)["x"]
    assert torch.equal(L, L.tril())
    assert_close(L @ L.mT, K, 1e-12)


def test_wrong_uses_are_refused() -> None:
    model, data = tiny.tiny_llama(targets=("q_proj",)), tiny.batch(3, length=5)
    calculate = ours.calculate_kronecker_factors
    with pytest.raises(ValueError, match="nothing"):
        calculate(model, last_real, [data], target_module_keywords=["nothing"])
    with pytest.raises(ValueError, match="forward_call gives no labels"):
        calculate(model, last_real, [data], fisher="empirical")
    with pytest.raises(InvalidBatchError, match="no batch"):
        calculate(model, last_real, [], target_module_keywords=LORA)
    with pytest.raises(InvalidBatchError, match=r"\[N, C\]"):
        calculate(model, lambda m, b: m(b["input_ids"]).logits, [data], target_module_keywords=LORA)
    linear = nn.Linear(4, 3)
    with pytest.raises(InvalidBatchError, match="not finite"):
        calculate(nn.Sequential(linear), lambda m, x: m(x), [torch.full((2, 4), torch.nan)])
    with pytest.raises(ValueError, match="square"):
        ours.stable_cholesky(torch.zeros(3, 4))
    factors = rooted(model, [data], 2, 10)
    s2 = torch.tensor(1.0)
    with pytest.raises(ValueError, match="n_kfac=3"):
        ours.model_evidence(model, s2, factors, RANK, 3, s2)
    jacobian, _ = ours.jacobian_mean(model, data, torch.tensor(tiny.ANSWERS))
    with pytest.raises(ValueError, match="0 of the Jacobian's"):
        ours.variance(None, {"x": next(iter(jacobian.values()))}, factors, s2, 3, RANK, 2, "cpu")
    with pytest.raises(ValueError, match="expected 5"):
        ours.variance(None, jacobian, factors, s2, 5, RANK, 2, "cpu")

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x)

    with pytest.raises(UnsupportedAdapterError, match="'two' shares"):
        calculate(Shared(), lambda m, x: m(x), [torch.ones(2, 4)])


def test_logits_that_depend_on_pads_are_refused() -> None:
    """BERT pools position 0; transformers masks a pad's key, not its query."""
    model = tiny.tiny_bert_classifier(3)
    ours.jacobian_mean(model, tiny.batch(4, padding="right", labels=False), is_s2s=True)
    with pytest.raises(InvalidBatchError, match="depend on padded positions"):
        ours.jacobian_mean(model, tiny.batch(4, padding="left", labels=False), is_s2s=True)
