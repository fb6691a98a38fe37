"""DoRA: the exact Jacobian goes through the norm of W0 + s B A, which PEFT's backward pass leaves out."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor

from laplace_lora_fast import KFAC, Answers, Classes, Diagonal, LaplaceLoRA, Rows, UnsupportedAdapterError
from tests import oracle, tiny
from tests.dora import through_the_norm

PRECISION = 3.0
BATCH = tiny.batch(6, seed=3)


def adapted(make=tiny.tiny_llama, **options):
    model = make(use_dora=True, **options)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():  # magnitudes as after training
        if "magnitude" in name:
            with torch.no_grad():
                noise = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.mul_(0.5 + noise)
    return model


def jacobian(model, batch, logits_of) -> Tensor:
    """D logits / d theta [N, C, P] through the norm."""
    with through_the_norm():
        found = oracle.jacobians(model, batch, logits_of)
    return torch.cat(list(found.values()), 2)


def covariance(model, train, test, logits_of) -> Tensor:
    """Of the exact GGN, dense."""
    rows = jacobian(model, train, logits_of)
    precision = PRECISION * torch.eye(rows.shape[2], dtype=rows.dtype)
    for row, single in zip(rows, oracle.examples(train), strict=True):
        precision += row.mT @ oracle.softmax_hessian(logits_of(model, single).detach()) @ row
    new = jacobian(model, test, logits_of)
    return new @ torch.linalg.solve(precision, new.mT)


CASES = {
    "decoder": (tiny.tiny_llama, Answers(tiny.ANSWERS), oracle.answer_logits, {}),
    "all linear layers": (tiny.tiny_llama, Answers(tiny.ANSWERS), oracle.answer_logits, {
        "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    }),
    "one layer of several": (tiny.tiny_llama, Answers(tiny.ANSWERS), oracle.answer_logits, {
        "targets": ["layers.1.self_attn.v_proj"],
    }),
    "layers with a bias": (lambda **o: tiny.tiny_bert_classifier(3, **o), Classes(), oracle.class_logits, {}),
    "Conv1D": (tiny.tiny_gpt2, Answers(tiny.ANSWERS), oracle.answer_logits, {}),
    "rsLoRA": (tiny.tiny_llama, Answers(tiny.ANSWERS), oracle.answer_logits, {"use_rslora": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_rows_are_exact(case: str) -> None:
    make, task, logits_of, options = CASES[case]
    model = adapted(make, **options)
    right = "gpt2" in case or not isinstance(task, Answers)
    train, test = BATCH, tiny.batch(3, seed=4)
    if right:
        train, test = (tiny.repad(batch, "right", 7) for batch in (train, test))
    la = LaplaceLoRA(model, task, structure=Rows(), prior_precision=PRECISION)
    la.fit(tiny.split(train, 4), progress=False)
    _, cov = la.logit_distribution(test)
    precision = 1e-10 if case != "Conv1D" and "bias" not in case else 1e-6  # norms and softmax in fp32
    oracle.assert_close(cov, covariance(model, train, test, logits_of), precision)


def test_the_oracle_is_the_function_of_the_model() -> None:
    """Its value is PEFT's, and its derivative PEFT's difference quotient, which no detached norm can change."""
    model = adapted().eval()
    single = oracle.examples(tiny.batch(1, seed=4))[0]
    found = jacobian(model, tiny.batch(1, seed=4), oracle.answer_logits)[0]
    weights = [p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name]
    direction = [
        torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=w.dtype) for w in weights
    ]
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for weight, step in zip(weights, direction, strict=True):
                weight += sign * 1e-6 * step
            ends.append(oracle.answer_logits(model, single))
            for weight, step in zip(weights, direction, strict=True):
                weight -= sign * 1e-6 * step
    quotient = (ends[0] - ends[1]) / 2e-6
    by_name = dict(zip([name for name, _ in model.named_parameters() if "lora_A" in name or "lora_B" in name],
                       direction, strict=True))  # fmt: skip
    order = [
        by_name[f"{name}.lora_{side}.default.weight"].flatten()
        for name in oracle.lora_modules(model)
        for side in "AB"
    ]
    oracle.assert_close(found @ torch.cat(order), quotient, 1e-6)


def test_what_the_norm_adds_is_not_small() -> None:
    model = adapted()
    whole = jacobian(model, BATCH, oracle.answer_logits)
    plain = torch.cat(list(oracle.jacobians(model, BATCH, oracle.answer_logits).values()), 2)
    assert (whole - plain).norm() > 0.05 * whole.norm()


@pytest.mark.parametrize("size", [1, 6])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_batches_and_pads_change_nothing(size: int, padding: str) -> None:
    model = adapted()
    covs = []
    for batch, n in ((BATCH, 4), (tiny.repad(BATCH, padding, 9), size)):
        la = LaplaceLoRA(model, Answers(tiny.ANSWERS), structure=Rows(), prior_precision=PRECISION)
        covs.append(la.fit(tiny.split(batch, n), progress=False).logit_distribution(batch)[1])
    oracle.assert_close(covs[1], covs[0], 1e-10)


def test_checkpointing_changes_nothing() -> None:
    covs = []
    for checkpointing in (False, True):
        model = adapted()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        la = LaplaceLoRA(model, Answers(tiny.ANSWERS), structure=Rows(), prior_precision=PRECISION)
        covs.append(la.fit([BATCH], progress=False).logit_distribution(BATCH)[1])
    oracle.assert_close(covs[1], covs[0], 1e-12)


def test_the_diagonal_is_exact() -> None:
    model = adapted()
    la = LaplaceLoRA(model, Answers(tiny.ANSWERS), structure=Diagonal(), prior_precision=PRECISION)
    la.fit([BATCH], progress=False)
    rows = jacobian(model, BATCH, oracle.answer_logits)
    hessians = torch.stack([
        oracle.softmax_hessian(oracle.answer_logits(model, single).detach()) for single in oracle.examples(BATCH)
    ])  # fmt: skip
    diagonal = torch.einsum("ncp,ncd,ndp->p", rows, hessians, rows)
    new = jacobian(model, tiny.batch(2, seed=9), oracle.answer_logits)
    expected = new @ (new / (PRECISION + diagonal)).mT
    oracle.assert_close(la.logit_distribution(tiny.batch(2, seed=9))[1], expected, 1e-10)


def test_auto_takes_rows_and_kfac_is_refused() -> None:
    la = LaplaceLoRA(adapted(), Answers(tiny.ANSWERS)).fit([BATCH], progress=False)
    assert isinstance(la._fitted().structure, Rows)
    with pytest.raises(UnsupportedAdapterError, match=r"DoRA.*Rows\(\)"):
        LaplaceLoRA(adapted(), Answers(tiny.ANSWERS), structure=KFAC()).fit([BATCH], progress=False)


def test_saved_and_loaded(tmp_path) -> None:
    model = adapted()
    la = LaplaceLoRA(model, Answers(tiny.ANSWERS), prior_precision=PRECISION).fit([BATCH], progress=False)
    la.save(tmp_path)
    again = LaplaceLoRA.load(tmp_path, model)
    assert torch.equal(again.logit_distribution(BATCH)[1], la.logit_distribution(BATCH)[1])


def test_a_changed_magnitude_is_noticed(tmp_path) -> None:
    model = adapted()
    LaplaceLoRA(model, Answers(tiny.ANSWERS)).fit([BATCH], progress=False).save(tmp_path)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "magnitude" in name)[0] += 0.1
    with pytest.raises(Exception, match=r"magnitude|weights"):
        LaplaceLoRA.load(tmp_path, model).predict(BATCH)


def test_a_head_with_dora_is_refused() -> None:
    with pytest.raises(UnsupportedAdapterError, match=r"lm_head.*output head with DoRA"):
        LaplaceLoRA(adapted(targets=["q_proj", "lm_head"]), Answers(tiny.ANSWERS))


def test_kept_norms_are_refused() -> None:
    from peft.helpers import DoraCaching

    model = adapted()
    with DoraCaching(), pytest.raises(UnsupportedAdapterError, match="DoraCaching"):
        LaplaceLoRA(model, Answers(tiny.ANSWERS)).fit([BATCH], progress=False)


def test_refit_starts_from_the_normalised_base() -> None:
    """The prior's function is the model with B = 0, whose rows are of length m still."""
    model = adapted()
    la = LaplaceLoRA(model, Answers(tiny.ANSWERS), structure=Rows(refit=True), prior_precision=1e9)
    la.fit([BATCH], progress=False)
    mean, _ = la.logit_distribution(BATCH)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    expected = torch.stack([oracle.answer_logits(model, single) for single in oracle.examples(BATCH)])
    oracle.assert_close(mean - mean[:, :1], (expected - expected[:, :1]).detach(), 1e-6)


def test_peft_still_detaches_the_norm() -> None:
    """What the module docstring says. Should PEFT change, the tap's plain part would count the norm twice."""
    model = adapted().eval()
    whole, plain = (
        jacobian(model, BATCH, oracle.answer_logits),
        torch.cat(list(oracle.jacobians(model, BATCH, oracle.answer_logits).values()), 2),
    )
    assert not torch.allclose(whole, plain)
    assert isinstance(model, peft.PeftModel)


def test_samples_go_through_the_norm() -> None:
    """Linearised: f + J delta. As weights: the model with those weights."""
    model = adapted()
    la = LaplaceLoRA(model, Answers(tiny.ANSWERS), structure=Rows(), prior_precision=30.0)
    samples = la.fit([BATCH], progress=False).sample(3)
    names = [f"{name}.lora_{side}.default.weight" for name in oracle.lora_modules(model) for side in "AB"]
    stored = [d if "lora_A" in name else d.mT for name, d in zip(names, samples.deltas, strict=True)]
    flat = torch.cat([d.flatten(1) for d in stored], 1)
    rows = jacobian(model, BATCH, oracle.answer_logits)
    at_trained = torch.stack(
        [oracle.answer_logits(model, single) for single in oracle.examples(BATCH)]
    ).detach()
    oracle.assert_close(samples.outputs(BATCH), at_trained + torch.einsum("ncp,sp->snc", rows, flat), 1e-10)

    found = samples.outputs(BATCH, linearised=False)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, step in zip(names, stored, strict=True):
            parameters[name] += step[1]
    moved = torch.stack([oracle.answer_logits(model, single) for single in oracle.examples(BATCH)]).detach()
    oracle.assert_close(found[1], moved, 1e-10)
