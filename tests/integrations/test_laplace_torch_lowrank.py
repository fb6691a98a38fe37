"""`lowrank_kron` against `kron` on the same factors, and what only it does."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from laplace_lora_fast import KFAC, Answers, LaplaceLoRA
from tests import tiny
from tests.integrations import batched
from tests.oracle import assert_close

pytest.importorskip("laplace", reason="needs laplace-torch")
pytest.importorskip("curvlinops", reason="needs curvlinops-for-pytorch")

from laplace import Laplace
from laplace.utils import Kron

from laplace_lora_fast.errors import NotFittedError, UnsupportedAdapterError
from laplace_lora_fast.integrations.laplace_torch import FastEF, FastGGN, LowRankKron

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TRAIN, TEST = tiny.batch(9, length=6, seed=1), tiny.batch(4, length=5, seed=2)


def lowrank(model: torch.nn.Module | None = None, likelihood: str = "classification", **options: object):
    return Laplace(model or batched.decoder(), likelihood, "all", "lowrank_kron", **options)


def pair(likelihood: str = "classification", backend=FastGGN, **options: object):
    """The same posterior in both structures, fitted; fp64."""
    model = batched.decoder()
    train = TRAIN if likelihood == "classification" else targets(model, TRAIN)
    dense = Laplace(
        model,
        likelihood,
        "all",
        "kron",
        backend=backend,
        backend_kwargs={"kfac_approx": "reduce"},
        **options,
    )
    low = lowrank(model, likelihood, backend=backend, **options)
    for la in (dense, low):
        la.fit(batched.loader(train, 4))
        la.prior_precision = torch.linspace(0.5, 2, la.n_layers, dtype=torch.float64)
    return dense, low


def targets(model: torch.nn.Module, data: tiny.Batch) -> tiny.Batch:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(data["input_ids"]), 3, generator=generator, dtype=torch.float64)
    return data | {"labels": model(data).detach() + noise}


@pytest.mark.parametrize(
    ("likelihood", "options"),
    [
        ("classification", {}),
        ("classification", {"backend": FastEF}),
        ("classification", {"temperature": 0.5}),
        ("regression", {"sigma_noise": 0.3}),
    ],
)
def test_the_complete_spectrum_is_kron(likelihood: str, options: dict[str, object]) -> None:
    dense, low = pair(likelihood, **options)
    assert_close(low.log_marginal_likelihood(), dense.log_marginal_likelihood(), 1e-9)
    assert_close(low.log_det_posterior_precision, dense.log_det_posterior_precision, 1e-9)
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(2, 3, low.n_params, generator=generator, dtype=torch.float64)
    for exponent in (-1, -0.5, 1):
        expected = dense.posterior_precision.bmm(vectors, exponent)
        assert_close(low.posterior_precision.bmm(vectors, exponent), expected, 1e-9)
        assert_close(low.posterior_precision.diag(exponent), dense.posterior_precision.diag(exponent), 1e-9)
    assert_close(low.log_prob(vectors[0, 0]), dense.log_prob(vectors[0, 0]), 1e-9)
    jacobians, _ = dense.backend.jacobians(TEST)
    assert_close(low.functional_variance(jacobians), dense.functional_variance(jacobians), 1e-9)
    for joint in (False, True):
        for found, expected in zip(
            low._glm_predictive_distribution(TEST, joint=joint),
            dense._glm_predictive_distribution(TEST, joint=joint),
            strict=True,
        ):
            assert_close(found, expected, 1e-9)


@pytest.mark.parametrize("link", ["probit", "bridge"])
def test_predictions_form_no_dense_jacobian(link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, low = pair()
    expected = dense(TEST, link_approx=link)
    monkeypatch.setattr(FastGGN, "jacobians", None)
    assert_close(low(TEST, link_approx=link), expected, 1e-9)


def test_sketched_factors_keep_a_tail_and_hold_nothing_of_size_d_by_d() -> None:
    model = batched.decoder(targets=("down_proj",), layers=1)  # d_in 24, d_out 16
    low = lowrank(model, structure=KFAC(tokens="expand", factors="sketch", columns=6))
    low.fit(batched.loader(TRAIN, 4))
    assert all(block.large.rank == 1 and block.large.tail > 0 for block in low.H.blocks)
    precision = low.posterior_precision
    matrix = precision.bmm(torch.eye(low.n_params, dtype=torch.float64), exponent=1)
    assert_close(matrix, matrix.mT, 1e-12)
    jacobians, _ = low.backend.jacobians(TEST)
    expected = jacobians @ torch.linalg.inv(matrix) @ jacobians.mT
    assert_close(low._glm_predictive_distribution(TEST)[1], expected, 1e-9)
    assert_close(precision.logdet(), matrix.logdet(), 1e-9)
    assert_close(precision.diag(), matrix.diagonal(), 1e-9)
    assert_close(precision.diag(-1), torch.linalg.inv(matrix).diagonal(), 1e-9)


def test_marglik_and_gridsearch_find_what_kron_finds() -> None:
    dense, low = pair()
    for la in (dense, low):
        la.optimize_prior_precision(method="marglik", prior_structure="layerwise", n_steps=20)
    assert_close(low.prior_precision, dense.prior_precision, 1e-9)
    for la in (dense, low):
        la.optimize_prior_precision(
            method="gridsearch", val_loader=batched.loader(TEST, 3), grid_size=5, log_prior_prec_min=-1
        )
    assert_close(low.prior_precision, dense.prior_precision, 1e-9)


def test_samples_have_the_posteriors_covariance() -> None:
    _, low = pair()
    samples = low.sample(4000, generator=torch.Generator().manual_seed(0)) - low.mean
    sigma = low.posterior_precision.diag(-1).sqrt()
    assert ((samples.std(0) / sigma - 1).abs() < 0.06).all()
    low(TEST, pred_type="nn", link_approx="mc", n_samples=2)
    assert torch.equal(low.mean, torch.nn.utils.parameters_to_vector(low.params))


def test_a_half_precision_base_with_fp32_adapters() -> None:
    model = tiny.tiny_llama(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    low = lowrank(batched.Batched(model, answers=True), prior_precision=0.7)
    low.fit(batched.loader(TRAIN, 4))
    assert low.prior_precision.dtype == torch.float32
    la = LaplaceLoRA(model, Answers(tiny.ANSWERS), structure="kfac", prior_precision=0.7)
    la.fit(tiny.split(TRAIN, 4), progress=False)
    assert_close(low.log_marginal_likelihood(), la.log_marginal_likelihood(), 1e-4)
    assert_close(low._glm_predictive_distribution(TEST)[1], la.logit_distribution(TEST)[1], 1e-4)
    low.optimize_prior_precision(method="marglik", n_steps=5)
    for _, curvature in (
        low.backend.kron(TEST, TEST["labels"], N=4),
        low.backend.diag(TEST, TEST["labels"]),
    ):
        assert (curvature.diag() if isinstance(curvature, Kron) else curvature).dtype == torch.float32


def test_state_dict_survives_a_safe_torch_load() -> None:
    _, low = pair()
    file = io.BytesIO()
    torch.save(low.state_dict(), file)
    file.seek(0)
    other = lowrank(low.model)
    with pytest.raises(NotFittedError):
        other.posterior_precision  # noqa: B018
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.log_marginal_likelihood(), low.log_marginal_likelihood())
    assert torch.equal(other(TEST), low(TEST))


def test_wrong_uses_are_refused() -> None:
    low = lowrank()
    low.fit(batched.loader(TRAIN, 4))
    with pytest.raises(ValueError, match="override"):
        low.fit(batched.loader(TRAIN, 4), override=False)
    with pytest.raises(ValueError, match="length 1 or 8"):
        low.prior_precision = torch.ones(low.n_params)
    with pytest.raises(ValueError, match="FastGGN or FastEF"):
        lowrank(backend=type("Other", (), {}))
    with pytest.raises(ValueError, match="reward_modeling"):
        lowrank(likelihood="reward_modeling")
    model = batched.decoder()
    model.model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(UnsupportedAdapterError, match="lm_head"):
        lowrank(model)


def test_precision_without_prior_is_the_curvature() -> None:
    dense, low = pair()
    vector = torch.ones(1, low.n_params, dtype=torch.float64)
    assert isinstance(low.H, LowRankKron)
    expected: Tensor = dense.H_facs.bmm(vector[None])[0]
    assert_close(low.H.bmm(vector, exponent=1), expected, 1e-9)
