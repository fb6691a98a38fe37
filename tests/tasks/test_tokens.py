"""`Tokens`: rows, factors and posteriors of labels drawn at every token, against autograd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from laplace_lora_fast import (
    KFAC,
    Answers,
    Evidence,
    HeldOut,
    InvalidBatchError,
    LaplaceLoRA,
    LeaveOneOut,
    Outputs,
    Rows,
    Tokens,
)
from laplace_lora_fast.model.tokens import chunks
from laplace_lora_fast.model.tokens.heads import _inverse_cdf, _uniforms
from tests import oracle, tiny
from tests.oracle import assert_close

TARGETS = {"attention": ("q_proj", "v_proj"), "lm_head": ("v_proj", "lm_head")}
M = 3


def batch(n: int = 4, seed: int = 0, padding: str = "right") -> tiny.Batch:
    """Texts of 4 to 7 tokens whose first two are prompts."""
    data = tiny.batch(n, length=7, seed=seed, padding=padding, labels=False)
    real = data["attention_mask"].cumsum(1)
    labels = data["input_ids"].masked_fill((data["attention_mask"] == 0) | (real <= 2), -100)
    return data | {"labels": labels}


def alone(data: tiny.Batch) -> list[tiny.Batch]:
    """Each text alone, without its pads."""
    found = []
    for row, mask in enumerate(data["attention_mask"].bool()):
        found.append({key: data[key][row][mask][None] for key in ("input_ids", "labels")})
    return found


def token_logits(model: nn.Module, single: tiny.Batch) -> Tensor:
    """Logits [L, V] that predict the labelled tokens."""
    logits = model(input_ids=single["input_ids"]).logits[0, :-1]
    return logits[single["labels"][0, 1:] != -100]


def residuals(logits: Tensor, single: tiny.Batch, samples: int, seed: int = 0) -> Tensor:
    """C = p - e_y [L, V, M], the labels drawn as documented: the first token whose cdf exceeds a uniform number."""
    p = logits.detach().softmax(-1)
    uniforms = _uniforms(single, samples, seed, len(p))[0]
    drawn = (p.cumsum(-1)[:, :, None] > uniforms[:, None]).int().argmax(1)  # [L, M]
    return p[:, :, None] - nn.functional.one_hot(drawn, p.shape[1]).mT.to(p)


def rows_of(la: LaplaceLoRA) -> dict[tuple[str, str], Tensor]:
    """Whole Jacobian rows [N, M, P] of every weight, flattened as the parameter is."""
    curvature = la.snapshot()[0].curvature
    found = {}
    for name, mean, rows in zip(curvature.names, curvature.means, curvature.rows, strict=True):
        matrices = rows.view(-1, M, *mean.shape)
        found[tuple(name)] = (matrices if name.side == "A" else matrices.mT).flatten(2)
    return found


def fitted(loader: list[tiny.Batch], targets: str = "attention", **options: object) -> LaplaceLoRA:
    model = tiny.tiny_llama(targets=TARGETS[targets])
    options = {"structure": Rows(columns=64), "prior_precision": 0.7} | options
    return LaplaceLoRA(model, Tokens(samples=M), **options).fit(loader, progress=False)


def test_no_more_logits_than_a_chunk_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 4 * tiny.VOCAB * 2)
    model, seen = tiny.tiny_llama(), []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: seen.append(output.shape[:2]))
    la = LaplaceLoRA(model, Tokens(samples=M), structure=Rows()).fit([batch()], progress=False)
    fitted_with = set(map(tuple, seen))
    assert (1, 7) in fitted_with, "how positions are probed, once"
    assert all(rows * length <= 8 for rows, length in fitted_with), (
        "the first text alone, for a proof, or all"
    )
    assert (4, 2) in fitted_with
    seen.clear()
    la.token_uncertainty(batch(), n_samples=2)
    assert all(rows * length <= 8 for rows, length in seen), (
        "two samples of four texts, or of two for the proof"
    )


@pytest.mark.parametrize("chunk", [2**25, 4 * tiny.VOCAB * 2], ids=["whole", "chunks"])
@pytest.mark.parametrize("targets", TARGETS)
def test_rows_are_residuals_times_jacobians(
    targets: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    data = batch()
    la = fitted([data], targets)
    expected: dict[tuple[str, str], list[Tensor]] = {}
    for single in alone(data):
        if (single["labels"][0, 1:] == -100).all():
            for key, rows in rows_of(la).items():
                expected.setdefault(key, []).append(torch.zeros_like(rows[0]))
            continue
        c = residuals(token_logits(la.model, single), single, M)
        flat = oracle.jacobians(la.model, single, lambda m, _, s=single: token_logits(m, s).flatten())
        for key, J in flat.items():
            expected.setdefault(key, []).append(torch.einsum("xm,xp->mp", c.flatten(0, 1), J[0]))
    got = rows_of(la)
    assert got.keys() == expected.keys()
    for key, rows in got.items():
        assert_close(rows, torch.stack(expected[key]), 1e-10)


def test_the_mean_outer_product_is_the_exact_ggn() -> None:
    model = tiny.tiny_llama(r=2, layers=1).eval()
    exact, estimate = 0.0, 0.0
    for single in alone(batch(3)):
        logits = token_logits(model, single)
        if not len(logits):
            continue
        per_weight = oracle.jacobians(model, single, lambda m, _, s=single: token_logits(m, s).flatten())
        J = torch.cat([each[0] for each in per_weight.values()], 1).view(*logits.shape, -1)  # [L, V, P]
        p = logits.detach().softmax(-1)
        hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        exact = exact + torch.einsum("tvp,tvw,twq->pq", J, hessian, J)
        rows = torch.einsum("tvm,tvp->mp", residuals(logits, single, 4096), J)
        estimate = estimate + rows.mT @ rows / 4096
    assert (estimate - exact).norm() < 0.05 * exact.norm()


def test_labels_are_drawn_by_their_probabilities() -> None:
    log_probs = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64).log()[None, None]
    uniforms = ((torch.arange(1000) + 0.5) / 1000).double().view(1, 1, -1)
    counts = torch.bincount(_inverse_cdf(log_probs, uniforms).flatten(), minlength=4)
    assert counts.tolist() == [100, 0, 600, 300]


@pytest.mark.parametrize("targets", TARGETS)
def test_kfac_expand_against_the_streams(targets: str) -> None:
    data = batch()
    la = fitted([data], targets, structure=KFAC(tokens="expand", factors="dense"))
    singles = [each for each in alone(data) if (each["labels"][0, 1:] != -100).any()]
    streams: dict[str, oracle.Stream] = {}
    for single in singles:

        def cotangents(logits: Tensor, _: tiny.Batch, single: tiny.Batch = single) -> Tensor:
            c = residuals(logits.view(-1, tiny.VOCAB), single, M)
            return c.flatten(0, 1) / M**0.5

        of_one = oracle.streams(
            la.model,
            {"input_ids": single["input_ids"]},
            lambda m, _, s=single: token_logits(m, s).flatten(),
            cotangents,
        )
        for name, stream in of_one.items():
            total = streams.setdefault(name, oracle.Stream())
            for part in ("x", "z", "g_a", "g_b"):
                getattr(total, part).extend(getattr(stream, part))
    for name, factors in la.factors.items():
        if name.endswith("lm_head"):
            continue  # the oracle's head sees all positions, ours the labelled ones: checked by its rows
        x, g = oracle.kfac(streams[name].x, streams[name].g_a, "expand")
        assert_close(factors.A.gradient_factor, g, 1e-9)
        if len(singles) == len(alone(data)):
            assert_close(factors.A.input_factor, x, 1e-9)


def test_nothing_depends_on_how_texts_are_batched() -> None:
    data = batch(6)
    reference = rows_of(fitted([data]))
    apart = rows_of(fitted(tiny.split(data, 1)))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = rows_of(fitted([{key: value[order] for key, value in data.items()}]))
    left = tiny.repad(data, "left", 9)
    labels = torch.full_like(left["input_ids"], -100)
    for row, mask in enumerate(data["attention_mask"].bool()):
        labels[row, 9 - int(mask.sum()) :] = data["labels"][row][mask]
    padded = rows_of(fitted([left | {"labels": labels}]))
    for key, rows in reference.items():
        assert_close(apart[key], rows, 1e-9)
        assert_close(shuffled[key], rows[order], 1e-9)
        assert_close(padded[key], rows, 1e-9)


def test_more_samples_keep_the_first_and_seeds_differ() -> None:
    single = alone(batch())[0]
    few, many = _uniforms(single, 2, 0, 5), _uniforms(single, 5, 0, 5)
    assert torch.equal(few[:, :, 0], many[:, :, 0])
    assert not torch.equal(few, _uniforms(single, 2, 1, 5))


def test_a_weight_scales_the_curvature() -> None:
    model, data = tiny.tiny_llama(), [batch()]
    whole = LaplaceLoRA(model, Tokens(samples=M), prior_precision=0.7).fit(data, progress=False)
    half = LaplaceLoRA(model, Tokens(samples=M, likelihood_weight=0.5), prior_precision=0.35)
    half.fit(data, progress=False)
    twice = [part * 0.5 for part in whole.sequence_log_prob(data[0])]
    assert_close(half.sequence_log_prob(data[0])[1], twice[1] * 4, 1e-9)


def test_auto_takes_rows_or_kfac_expand() -> None:
    assert isinstance(fitted([batch()], structure="auto").snapshot()[0].structure, Rows)
    structure = fitted([batch()], structure="auto", budget=1000).snapshot()[0].structure
    assert structure == KFAC(tokens="expand")


def test_saved_and_loaded(tmp_path: Path) -> None:
    la = fitted([batch()])
    la.save(tmp_path)
    again = LaplaceLoRA.load(tmp_path, la.model)
    assert again.task == Tokens(samples=M)
    for one, other in zip(la.sequence_log_prob(batch()), again.sequence_log_prob(batch()), strict=True):
        assert torch.equal(one, other)


def test_held_out_texts_choose_the_prior_precision() -> None:
    la, held_out = fitted([batch()]), batch(5, seed=3)
    grid = [0.1, 3e3, 1e7]
    found = []
    for value in grid:
        u = la.token_uncertainty(held_out, n_samples=6, prior_precision=value)
        found.append(float(u.nll[u.mask].mean()))
    best = grid[min(range(3), key=found.__getitem__)]
    assert best == 3e3, "the edge of the grid would warn"
    assert la.optimize_prior_precision(HeldOut([held_out], grid=grid, n_samples=6), progress=False) == best
    parts = HeldOut(tiny.split(held_out, 2), grid=grid, n_samples=6)
    assert la.optimize_prior_precision(parts, progress=False) == best


def test_without_a_grid_decades_are_refined() -> None:
    la, held_out = fitted([batch()]), batch(5, seed=3)
    chosen = la.optimize_prior_precision(HeldOut([held_out], n_samples=4), progress=False)

    def nll(value: float) -> float:
        u = la.token_uncertainty(held_out, n_samples=4, prior_precision=value)
        return float(u.nll[u.mask].mean())

    assert nll(chosen) <= min(nll(10.0**decade) for decade in range(-2, 7))


@pytest.mark.parametrize(
    ("act", "match"),
    [
        (lambda la: la.log_marginal_likelihood(), "no evidence for Tokens"),
        (lambda la: la.optimize_prior_precision(), "no evidence for Tokens"),
        (lambda la: la.optimize_prior_precision(Evidence()), "no evidence for Tokens"),
        (lambda la: la.optimize_prior_precision(LeaveOneOut()), "Rows\\(refit=True\\)"),
        (lambda la: la.optimize_prior_precision(HeldOut([], link_approx="probit")), "leave link_approx out"),
        (lambda la: la.optimize_prior_precision(HeldOut(iter([]))), "DataLoader or a list"),
        (lambda la: la.predict(batch()), "token_uncertainty"),
        (lambda la: la.logit_distribution(batch()), "token_uncertainty"),
        (lambda la: la.predictions([batch()]), "token_uncertainty"),
        (lambda la: la.sequence_log_prob(batch(), score="max"), "score must be one of"),
    ],
)
def test_what_has_no_meaning_is_refused(act: object, match: str) -> None:
    la = fitted([batch()])
    with pytest.raises(ValueError, match=match):
        act(la)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("structure", "match"),
    [(Rows(refit=True), "leave refit=True out"), (KFAC(fisher="empirical"), "leave fisher='empirical' out")],
)
def test_structures_that_need_given_labels_are_refused(structure: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LaplaceLoRA(tiny.tiny_llama(), Tokens(), structure=structure)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data["labels"][:, 0], "of shape \\(4, 7\\)"),
        (lambda data: data["labels"].double(), "token ids of shape"),
        (lambda data: data["labels"].masked_fill(data["attention_mask"] == 0, 3), "a token at a pad"),
        (lambda data: data["labels"].masked_fill(data["labels"] != -100, tiny.VOCAB), "lie in \\[0, 48\\)"),
        (lambda data: None, "got NoneType"),
    ],
)
def test_wrong_labels_are_refused(change: object, match: str) -> None:
    data = batch()
    data["labels"] = change(data)  # type: ignore[operator]
    with pytest.raises(InvalidBatchError, match=match):
        fitted([data])


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="Tokens needs a causal language model"):
        LaplaceLoRA(tiny.tiny_llama_classifier(3), Tokens())


@pytest.mark.parametrize("given", ["head", "itself"])
def test_the_backbone_is_found(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `get_decoder` gives the language-model head, as ModernBERT's does, or the model, as that of Llama 4."""
    monkeypatch.setattr(chunks, "CHUNK", 4 * tiny.VOCAB * 2)
    reference, model, data = fitted([batch()]), tiny.tiny_llama(), batch()
    inner = model.get_base_model()
    inner.get_decoder = inner.get_output_embeddings if given == "head" else lambda: inner
    if given == "itself":
        monkeypatch.setattr(type(inner), "base_model", property(lambda self: self))
    la = LaplaceLoRA(model, Tokens(samples=M), structure=Rows(columns=64), prior_precision=0.7)
    la.fit([data], progress=False)
    found, expected = (each.token_uncertainty(data, n_samples=2).total for each in (la, reference))
    assert_close(found[found.isfinite()], expected[found.isfinite()], 1e-10)
    assert found.isfinite().any()


def test_text_needs_a_posterior_of_all_tokens() -> None:
    la = LaplaceLoRA(tiny.tiny_llama(targets=("lm_head",)), Answers(tiny.ANSWERS))
    la.fit([tiny.batch(4)], progress=False)
    with pytest.raises(ValueError, match="lm_head' has a posterior for the answers' tokens only"):
        la.token_uncertainty(batch())


@pytest.mark.parametrize("targets", TARGETS)
def test_variance_of_a_log_probability_against_the_dense_posterior(targets: str) -> None:
    data, new = batch(), batch(5, seed=2)
    la = fitted([data], targets)
    rows = torch.cat(list(rows_of(la).values()), 2).flatten(0, 1)
    hessian = rows.mT @ rows / M + 0.7 * torch.eye(rows.shape[1], dtype=torch.float64)
    mean, variance = la.sequence_log_prob(new)
    per_token, scaled = la.sequence_log_prob(new, score="mean")
    for row, single in enumerate(alone(new)):

        def score(model: nn.Module, _: tiny.Batch, single: tiny.Batch = single) -> Tensor:
            logits, labels = token_logits(model, single), single["labels"][0, 1:]
            own = logits.log_softmax(-1).gather(1, labels[labels != -100][:, None])
            return own.sum()[None]

        count = int((single["labels"][0, 1:] != -100).sum())
        if not count:
            assert mean[row] == variance[row] == 0
            continue
        J = torch.cat([each[0] for each in oracle.jacobians(la.model, single, score).values()], 1)
        expected = (J @ torch.linalg.solve(hessian, J.mT))[0, 0]
        assert_close(variance[row], expected, 1e-9)
        assert_close(mean[row], score(la.model, single).detach()[0], 1e-10)
        assert_close(scaled[row], expected / count**2, 1e-9)
        assert_close(per_token[row], mean[row] / count, 1e-10)


def test_a_soft_cap_behind_the_head_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks run the model's own code behind its head."""
    monkeypatch.setattr(chunks, "CHUNK", 4 * tiny.VOCAB * 2)
    model, data = tiny.tiny_llama(), batch()
    inner = model.get_base_model()
    plain = inner.forward

    def capped(*args: object, **kwargs: object) -> object:
        output = plain(*args, **kwargs)
        output.logits = 2 * torch.tanh(output.logits / 2)
        return output

    inner.forward = capped
    la = LaplaceLoRA(model, Tokens(samples=M), structure=Rows(columns=64)).fit([data], progress=False)

    def score(output: object, inputs: tiny.Batch) -> Tensor:
        log_probs = output.logits[:, :-1].log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None])[..., 0]
        counted = data["labels"][: len(log_probs), 1:] != -100
        return log_probs.where(counted, 0).sum(1, keepdim=True)

    mean, _ = la.sequence_log_prob(data)
    other = LaplaceLoRA(model, Outputs(score, "regression")).fit(
        [data | {"labels": torch.zeros(4, dtype=torch.float64)}], progress=False
    )
    assert_close(mean, other.predict(data)[:, 0], 1e-10)
