"""Dual (exact GGN), EKFAC and diagonal structures against dense linear algebra over all weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from laplace_lora_fast import InvalidBatchError, LaplaceLoRA, NumericalError, UnsupportedAdapterError
from laplace_lora_fast.dual import RowAccumulator
from tests import oracle, tiny
from tests.oracle import assert_close

TRAIN = tiny.batch(7, length=6, seed=1, padding="right")
TEST = tiny.batch(3, length=5, seed=2, labels=False, padding="right")
LAYERS = "base_model.model.model.layers."
PRIORS = {
    "scalar": 0.7,
    "ab": {"A": 0.3, "B": 2.0},
    "layerwise": {f"{LAYERS}{i}.self_attn.{p}_proj": 0.5 + i + (p == "v") for i in (0, 1) for p in "qv"},
}


def model_of(classes: int) -> torch.nn.Module:
    return tiny.tiny_llama_classifier(classes)


def fitted(model: torch.nn.Module, structure: str, classes: int = 3, **options: object) -> LaplaceLoRA:
    data = TRAIN | {"labels": TRAIN["labels"] % classes}
    la = LaplaceLoRA(model, structure=structure, **{"row_sketch_size": 16} | options)
    return la.fit(tiny.split(data, 3), progress=False)


def fisher_rows(model: torch.nn.Module, classes: int, fisher: str) -> dict[tuple[str, str], Tensor]:
    """Fisher-weighted Jacobian rows [R, P] of every weight."""
    data = TRAIN | {"labels": TRAIN["labels"] % classes}
    jacobians = oracle.jacobians(model, data, oracle.class_logits)
    cotangents = oracle.exact_cotangents if fisher == "exact" else oracle.empirical_cotangents
    singles = oracle.examples(data)
    roots = [cotangents(oracle.class_logits(model, single).detach(), single) for single in singles]
    return {
        key: torch.cat([r.mT @ j for r, j in zip(roots, js, strict=True)]) for key, js in jacobians.items()
    }


def precisions_of(la: LaplaceLoRA) -> dict[tuple[str, str], float]:
    return dict(zip(la.posterior.curvature.names, la.posterior.prior_precision.tolist(), strict=True))


def dense_ggn(la: LaplaceLoRA, rows: dict[tuple[str, str], Tensor]) -> tuple[Tensor, Tensor]:
    """H + Lambda over all weights, and Lambda's diagonal."""
    phi = torch.cat(list(rows.values()), 1)
    lams = precisions_of(la)
    diagonal = torch.cat([torch.full((js.shape[1],), lams[key], dtype=phi.dtype) for key, js in rows.items()])
    return phi.mT @ phi + torch.diag(diagonal), diagonal


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_dual_equals_the_dense_full_ggn(classes: int, fisher: str, prior: str) -> None:
    """Covariance, evidence, effective parameters: m = d, all layers together."""
    model = model_of(classes)
    la = fitted(model, "dual", classes, fisher=fisher, prior_precision=PRIORS[prior])
    rows = fisher_rows(model, classes, fisher)
    precision, diagonal = dense_ggn(la, rows)
    test = torch.cat(list(oracle.jacobians(model, TEST, oracle.class_logits).values()), 2)
    _, cov = la.logit_distribution(TEST)
    assert_close(cov, test @ torch.linalg.inv(precision) @ test.mT, 1e-8)
    ratio = torch.linalg.slogdet(precision).logabsdet - diagonal.log().sum()
    assert la.posterior.log_det_ratio().item() == pytest.approx(ratio.item(), rel=1e-8)
    gamma = 1 - diagonal * torch.linalg.inv(precision).diagonal()
    expected = torch.stack([part.sum() for part in gamma.split([js.shape[1] for js in rows.values()])])
    assert_close(la.posterior.effective_parameters(), expected, 1e-8)


def test_dual_contrasts_and_several_priors_in_one_pass() -> None:
    model = model_of(3)
    la = fitted(model, "dual")
    many = [0.1, {"A": 1.0, "B": 3.0}, 30.0, {"A": 1.0, "B": 9.0}]
    probs = la.predict(TEST, prior_precision=many)
    _, covs = la.logit_distribution(TEST, prior_precision=many)
    for index, value in enumerate(many):
        la.prior_precision = value
        assert_close(covs[index], la.logit_distribution(TEST)[1], 1e-10)
        assert_close(probs[index], la.predict(TEST), 1e-10)


@pytest.mark.parametrize("structure", ["scalar", "ab", "layerwise"])
def test_dual_evidence_is_stationary(structure: str) -> None:
    la = fitted(model_of(3), "dual")
    best = la.optimize_prior_precision(prior_structure=structure)
    values = best if isinstance(best, dict) else {"": best}
    top, step = la.log_marginal_likelihood().item(), 1e-4
    for key in values:

        def shifted(by: float, key: str = key) -> float:
            moved = {k: v * math.exp(by) if k == key else v for k, v in values.items()}
            return la.log_marginal_likelihood(moved.get("", moved)).item()

        assert abs(shifted(step) - shifted(-step)) / (2 * step) < 1e-6
        assert max(shifted(0.3), shifted(-0.3)) < top


def test_dual_does_not_depend_on_batches_or_their_order() -> None:
    model = model_of(3)
    results = []
    for batches in (tiny.split(TRAIN, 1), tiny.split(TRAIN, 7), tiny.split(TRAIN, 2)[::-1]):
        la = LaplaceLoRA(model, structure="dual", row_sketch_size=5).fit(batches, progress=False)
        results.append((la.log_marginal_likelihood(), la.logit_distribution(TEST)[1]))
    for evidence, cov in results[1:]:
        assert evidence.item() == pytest.approx(results[0][0].item(), rel=1e-10)
        assert_close(cov, results[0][1], 1e-9)


def test_dual_sketch_is_unbiased_and_its_covariance_never_negative() -> None:
    model = model_of(2)
    exact = fitted(model, "dual", 2).logit_distribution(TEST, prior_precision=1e6)[
        1
    ]  # the prior's part: J* J*^T
    sketched = []
    for seed in range(40):
        la = fitted(model, "dual", 2, row_sketch_size=4, seed=1000 * seed)
        sketched.append(la.logit_distribution(TEST, prior_precision=1e6)[1])
        tiny_prior = la.logit_distribution(TEST, prior_precision=1e-6)[1]
        assert torch.linalg.eigvalsh(tiny_prior).min() > -1e-6 * tiny_prior.abs().max()
    assert_close(torch.stack(sketched).mean(0), exact, 0.1)
    assert (sketched[0] - exact).abs().max() > 0.01 * exact.abs().max()  # each one is off


@pytest.mark.parametrize("prior", ["scalar", "ab"])
def test_dual_samples_have_the_posteriors_moments(prior: str) -> None:
    """Matheron's rule, jointly over layers: the samples' logits have the predictive covariance."""
    model = model_of(2)
    la = fitted(model, "dual", 2, prior_precision=PRIORS[prior])
    samples = la.posterior.sample(20_000, torch.Generator().manual_seed(0))
    steps = [s - mean for s, mean in zip(samples, la.posterior.curvature.means, strict=True)]
    jacobians = oracle.jacobians(model, TEST, oracle.class_logits)
    outputs = 0
    for (key, js), step in zip(jacobians.items(), steps, strict=True):
        flat = (step if key[1] == "A" else step.mT).flatten(1)
        outputs = outputs + torch.einsum("ncp,sp->snc", js, flat)
    found = torch.einsum("snc,snd->ncd", outputs, outputs) / len(outputs)
    assert_close(found, la.logit_distribution(TEST)[1], 0.05)


def test_dual_dense_covariance_of_a_weight() -> None:
    model = model_of(3)
    la = fitted(model, "dual")
    rows = fisher_rows(model, 3, "exact")
    sigma = torch.linalg.inv(dense_ggn(la, rows)[0])
    start = 0
    for key, js in rows.items():
        own = slice(start, start + js.shape[1])
        assert_close(la.posterior.covariance(*key), sigma[own, own], 1e-8)
        start = own.stop
    with pytest.raises(ValueError, match="sketch_size"):
        fitted(model, "dual", row_sketch_size=4).posterior.covariance(*next(iter(rows)))


def test_rows_move_to_disk_when_they_exceed_the_budget() -> None:
    model = model_of(3)
    roomy, tight = fitted(model, "dual"), fitted(model, "dual", memory_budget=4096)
    files = [
        [rows.untyped_storage().filename for rows in la.posterior.curvature.rows] for la in (roomy, tight)
    ]
    assert not any(files[0])
    assert all(files[1])
    assert_close(tight.logit_distribution(TEST)[1], roomy.logit_distribution(TEST)[1], 1e-12)
    assert tight.log_marginal_likelihood().item() == pytest.approx(
        roomy.log_marginal_likelihood().item(), rel=1e-12
    )


def test_ekfac_keeps_the_trace_of_the_exact_ggn() -> None:
    model = model_of(3)
    curvature, rows = fitted(model, "ekfac").posterior.curvature, fisher_rows(model, 3, "exact")
    for key, block in zip(curvature.names, curvature.blocks, strict=True):
        values, counts = block.eigenvalues()
        assert (values * counts).sum().item() == pytest.approx(rows[key].square().sum().item(), rel=1e-9)


@pytest.mark.parametrize("rank", [None, 3])
def test_ekfac_covariance_equals_brute_force_in_its_basis(rank: int | None) -> None:
    model = model_of(3)
    la = fitted(model, "ekfac", prior_precision=0.5, rank=rank)
    rows, expected = fisher_rows(model, 3, "exact"), 0
    test = oracle.jacobians(model, TEST, oracle.class_logits)
    for key, block in zip(la.posterior.curvature.names, la.posterior.curvature.blocks, strict=True):
        v, u = block.small_vectors, block.large.vectors
        d, k = u.shape
        rest = torch.linalg.qr(torch.cat([u, torch.eye(d, dtype=u.dtype)], 1)).Q[:, k:d]
        r = v.shape[0]

        def oriented(js: Tensor, key: tuple[str, str] = key, r: int = r, d: int = d) -> Tensor:
            return js.view(*js.shape[:-1], r, d) if key[1] == "A" else js.view(*js.shape[:-1], d, r).mT

        phi, j = v.mT @ oriented(rows[key]), v.mT @ oriented(test[key])
        core = (phi @ u).square().sum(0)
        tail = (phi @ rest).square().sum((0, 2)) / max(d - k, 1)
        kept, left = j @ u, j @ rest
        expected = expected + torch.einsum("ncjk,nejk,jk->nce", kept, kept, 1 / (core + 0.5))
        expected = expected + torch.einsum("ncjk,nejk,j->nce", left, left, 1 / (tail + 0.5))
    assert_close(la.logit_distribution(TEST)[1], expected, 1e-8)


def test_ekfac_of_one_row_is_exact_in_its_basis() -> None:
    """One example, two classes: each block's GGN has rank one. EKFAC's trace is the GGN's, KFAC's is not."""
    model = model_of(2)
    one = {k: v[:1] for k, v in TRAIN.items()} | {"labels": torch.tensor([1])}
    ekfac = LaplaceLoRA(model, structure="ekfac").fit([one], progress=False)
    kfac = LaplaceLoRA(model, structure="kfac").fit([one], progress=False)
    hessian = oracle.softmax_hessian(oracle.class_logits(model, one).detach())
    jacobians = oracle.jacobians(model, one, oracle.class_logits)
    for block, other, key in zip(
        ekfac.posterior.curvature.blocks,
        kfac.posterior.curvature.blocks,
        ekfac.posterior.curvature.names,
        strict=True,
    ):
        trace = torch.trace(jacobians[key][0] @ jacobians[key][0].mT @ hessian).item()
        values, counts = block.eigenvalues()
        assert (values * counts).sum().item() == pytest.approx(trace, rel=1e-9)
        values, counts = other.eigenvalues()
        assert abs((values * counts).sum().item() / trace - 1) > 1e-3


def test_ekfac_needs_a_loader_that_can_be_read_twice() -> None:
    with pytest.raises(InvalidBatchError, match="twice"):
        LaplaceLoRA(model_of(3), structure="ekfac").fit(iter([TRAIN]), progress=False)


def test_diag_is_the_exact_diagonal() -> None:
    model = model_of(3)
    la = fitted(model, "diag", prior_precision=0.4)
    rows = fisher_rows(model, 3, "exact")
    test, expected = oracle.jacobians(model, TEST, oracle.class_logits), 0
    for key, phi in rows.items():
        variance = 1 / (phi.square().sum(0) + 0.4)
        expected = expected + (test[key] * variance) @ test[key].mT
        assert_close(la.posterior.covariance(*key), torch.diag(variance), 1e-9)
    assert_close(la.logit_distribution(TEST)[1], expected, 1e-9)
    with pytest.raises(ValueError, match="Kronecker"):
        _ = la.factors


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "dual", "diag"])
def test_every_structure_round_trips_and_samples(structure: str, tmp_path: object) -> None:
    model = model_of(3)
    la = fitted(model, structure, prior_precision={"A": 0.5, "B": 1.5})
    la.save(tmp_path)
    again = LaplaceLoRA.load(tmp_path, model)
    assert torch.equal(again.predict(TEST), la.predict(TEST))
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert again.options == la.options
    draws = [x.posterior.sample(2, torch.Generator().manual_seed(3)) for x in (la, again)]
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))
    assert f"structure {structure}" in la.summary()


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "dual", "diag"])
def test_every_structure_tunes_by_validation(structure: str) -> None:
    la, grid = fitted(model_of(3), structure), [1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3]
    val = tiny.batch(6, seed=7, padding="right")
    for form in ("scalar", "ab"):
        choices = grid if form == "scalar" else [{"A": a, "B": b} for a in grid for b in grid]
        nll = []
        for choice in choices:
            probs = la.predict(val, prior_precision=choice)
            nll.append(-probs[torch.arange(len(probs)), val["labels"]].log().mean().item())
        expected = choices[min(range(len(nll)), key=nll.__getitem__)]
        ends = expected.values() if isinstance(expected, dict) else [expected]
        options = {"val_loader": [val], "grid": grid, "prior_structure": form, "progress": False}
        if grid[0] in ends or grid[-1] in ends:
            with pytest.warns(Warning, match="edge"):
                assert la.optimize_prior_precision("val_nll", **options) == expected
        else:
            assert la.optimize_prior_precision("val_nll", **options) == expected


@pytest.mark.parametrize("structure", ["ekfac", "dual", "diag"])
def test_structures_see_through_padding_and_checkpointing(structure: str) -> None:
    model = model_of(3)
    plain = fitted(model, structure)
    padded = LaplaceLoRA(model, structure=structure, row_sketch_size=16)
    padded.fit(tiny.split(tiny.repad(TRAIN, "right", 11), 2), progress=False)
    assert_close(padded.logit_distribution(TEST)[1], plain.logit_distribution(TEST)[1], 1e-9)
    for reentrant in (True, False):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        again = fitted(model, structure)
        assert_close(again.logit_distribution(TEST)[1], plain.logit_distribution(TEST)[1], 1e-9)


def test_auto_chooses_the_dual_for_small_data_and_says_why() -> None:
    model = model_of(3)
    small = fitted(model, "auto")
    assert small.posterior.curvature.structure == "dual"
    assert "rows" in small.summary()
    assert fitted(model, "auto", memory_budget=1000).posterior.curvature.structure == "kfac"
    endless = LaplaceLoRA(model, structure="auto").fit(iter([TRAIN]), progress=False)
    assert endless.posterior.curvature.structure == "kfac"
    assert endless._fitted().n_examples == 7  # the batch looked at is not lost
    assert "no length" in endless.summary()


class Stream(IterableDataset):
    """Hands out one stream, however often it is asked."""

    def __init__(self, items: list[tiny.Batch]) -> None:
        self._items = iter(items)

    def __iter__(self) -> Iterator[tiny.Batch]:
        return self._items


@pytest.mark.parametrize("structure", ["auto", "kfac", "dual"])
def test_no_batch_of_a_stream_is_lost(structure: str) -> None:
    """Nor of a DataLoader over one, which has no length."""
    for stream in (Stream(tiny.split(TRAIN, 3)), DataLoader(Stream(tiny.split(TRAIN, 1)), batch_size=None)):
        la = LaplaceLoRA(model_of(3), structure=structure).fit(stream, progress=False)
        assert la.snapshot()[0].n_examples == len(TRAIN["labels"])
        if structure == "auto":
            assert "no length" in la.summary()


def test_a_pass_starts_its_loader_once() -> None:
    """Workers of a DataLoader, and draws of its order, would be doubled."""
    starts = []

    class Loader(list):
        def __iter__(self) -> Iterator[tiny.Batch]:
            starts.append(True)
            return super().__iter__()

    loader = Loader(tiny.split(TRAIN, 3))
    la = LaplaceLoRA(model_of(3), structure="auto").fit(loader, progress=False)
    assert len(starts) == 1
    la.predict_loader(loader, progress=False)
    assert len(starts) == 2


def test_ekfac_of_a_stream_is_refused() -> None:
    la = LaplaceLoRA(model_of(3), structure="ekfac")
    with pytest.raises(InvalidBatchError, match="no batch"):
        la.fit(Stream(tiny.split(TRAIN, 3)), progress=False)
    batches, passes = tiny.split(TRAIN, 3), []

    class Shrinking(list):
        def __iter__(self) -> Iterator[tiny.Batch]:
            passes.append(True)
            return iter(batches[: 5 - len(passes)])

    with pytest.raises(InvalidBatchError, match="7 examples in a first pass and 6 in a second"):
        la.fit(Shrinking(batches), progress=False)


NO_FACTORS = {
    "dual": {"structure": "dual"},
    "diag": {"structure": "diag"},
    "refit": {"mean": "refit", "structure": "auto"},
}


@pytest.mark.parametrize("name", NO_FACTORS)
def test_options_of_kfac_are_refused_where_there_is_none(name: str) -> None:
    for option in ({"kfac": "expand"}, {"rank": 3}, {"factor": "sketch"}):
        with pytest.raises(ValueError, match=rf"has no Kronecker factors: leave out {next(iter(option))}"):
            LaplaceLoRA(model_of(3), **NO_FACTORS[name], **option)


@pytest.mark.parametrize("number", [np.int64, np.int32, torch.tensor, float])
def test_whole_numbers_of_any_type_can_be_saved(number: Callable[[int], object], tmp_path: Path) -> None:
    options = {"rank": 3, "sketch_size": 8, "mc_samples": 2, "seed": 5, "memory_budget": 10**9}
    given = {name: number(value) for name, value in options.items()}
    la = LaplaceLoRA(model_of(3), structure="kfac", fisher="mc", **given).fit([TRAIN], progress=False)
    la.save(tmp_path)
    again = LaplaceLoRA.load(tmp_path, model_of(3)).options
    assert {name: getattr(again, name) for name in options} == options
    for name in options:
        with pytest.raises(ValueError, match=rf"{name} must be an integer"):
            LaplaceLoRA(model_of(3), structure="kfac", **{name: 2.5})


def test_layers_select_sites() -> None:
    model = tiny.tiny_llama()
    everything = LaplaceLoRA(model, answer_token_ids=tiny.ANSWERS, structure="kfac")
    names = [site.name for site in everything.sites]
    last = LaplaceLoRA(model, answer_token_ids=tiny.ANSWERS, layers="last")
    assert [site.name for site in last.sites] == names[2:]
    chosen = LaplaceLoRA(model, answer_token_ids=tiny.ANSWERS, layers=[names[1]], structure="kfac")
    assert [site.name for site in chosen.sites] == [names[1]]
    values = LaplaceLoRA(model, answer_token_ids=tiny.ANSWERS, layers=lambda name: "v_proj" in name)
    assert [site.name for site in values.sites] == names[1::2]
    data = tiny.batch(5)
    everything.fit([data], progress=False)
    chosen.fit([data], progress=False)
    assert_close(
        chosen.factors[names[1]].B.gradient_factor, everything.factors[names[1]].B.gradient_factor, 1e-12
    )
    with pytest.raises(UnsupportedAdapterError, match="nowhere"):
        LaplaceLoRA(model, answer_token_ids=tiny.ANSWERS, layers=["nowhere"])
    with pytest.raises(ValueError, match="layers"):
        LaplaceLoRA(model, answer_token_ids=tiny.ANSWERS, layers="first")


def test_last_layer_is_the_adapted_head_where_there_is_one() -> None:
    model = tiny.tiny_llama(targets=("q_proj", "lm_head"))
    la = LaplaceLoRA(model, answer_token_ids=tiny.ANSWERS, layers="last").fit([tiny.batch(5)], progress=False)
    assert [site.name for site in la.sites] == ["base_model.model.lm_head"]
    assert la.predict(tiny.batch(2)).shape == (2, 3)


def test_dual_refuses_rows_that_are_not_finite() -> None:
    la = LaplaceLoRA(model_of(3), structure="dual")
    rows = RowAccumulator(la.sites, sketch_size=4, memory_budget=10**6, seed=0)
    site = la.sites[0]
    rows.observe_jacobian(
        0, torch.ones(2, 1, 3, site.rank).double(), torch.full((2, 1, 3, site.d_in), torch.inf).double()
    )
    rows.directions(torch.ones(2, 2, 1).double())
    rows.finish_pass(2)
    rows.finish_batch()
    with pytest.raises(NumericalError, match=re.escape(site.name)):
        rows.curvature()


def test_rows_of_layers_a_pass_does_not_reach_are_zero() -> None:
    """So that rows of all layers stay aligned."""
    la = LaplaceLoRA(model_of(3), structure="dual")
    rows = RowAccumulator(la.sites, sketch_size=4, memory_budget=10**6, seed=0)
    small, large = (
        torch.ones(2, 1, 3, la.sites[0].rank).double(),
        torch.ones(2, 1, 3, la.sites[0].d_in).double(),
    )
    rows.directions(torch.ones(2, 3, 2).double())
    for passes in range(2):
        rows.observe_jacobian(2 * passes, small, large)
        rows.finish_pass(2)
    rows.finish_batch()
    matrices = rows.curvature().rows  # of each example, the first pass and the second
    assert all(len(matrix) == 4 for matrix in matrices)
    assert matrices[0][0::2].abs().min() > 0
    assert matrices[0][1::2].abs().max() == 0
    assert matrices[2][0::2].abs().max() == 0
    assert matrices[1].abs().max() == 0
