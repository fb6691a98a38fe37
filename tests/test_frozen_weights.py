"""LoRA weights that were not trained, among others that were: the posterior is over those that were, exactly."""

from __future__ import annotations

import re

import pytest
import torch

from laplace_lora_fast import (
    EKFAC,
    KFAC,
    Classes,
    Diagonal,
    LaplaceLoRA,
    LowRank,
    Rows,
    StateError,
    UnsupportedAdapterError,
)
from laplace_lora_fast.weights import weight_names
from tests import tiny
from tests.dora import through_the_norm
from tests.matrix import oracle
from tests.model.taps import ANSWERS
from tests.oracle import answer_logits, class_logits, examples

EXACT = Rows(columns=64)
FROZEN = {
    "lora_A": r"lora_A",
    "lora_B": r"lora_B",
    "lora_A of one layer": r"layers\.0.*lora_A",
    "one layer": r"layers\.0",
    "one side of each": r"q_proj.*lora_A|v_proj.*lora_B",
}
TRAIN, TEST = tiny.batch(6), tiny.batch(3, seed=1, labels=False)


def frozen(model, pattern):
    for name, parameter in model.named_parameters():
        if "lora" in name and re.search(pattern, name):
            parameter.requires_grad_(False)
    return model.eval()


def trained(model):
    return [p for name, p in model.named_parameters() if p.requires_grad]


def expected(model, logits, weights):
    return oracle.posterior(model, logits, examples(TRAIN), examples(TEST), weights)


def fitted(model, task=ANSWERS, structure=EXACT, train=TRAIN, **options):
    return LaplaceLoRA(model, task, structure=structure, **options).fit(tiny.split(train, 4), progress=False)


def close(found, wanted, tolerance=1e-8):
    for ours, theirs in zip(found, wanted, strict=True):
        assert oracle.error(ours, theirs) < tolerance


@pytest.mark.parametrize("pattern", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("structure", [EXACT, LowRank(rank=64, columns=64)], ids=["rows", "low rank"])
def test_the_posterior_is_over_the_weights_that_require_gradients(pattern, structure):
    model = frozen(tiny.tiny_llama(targets=("q_proj", "v_proj", "down_proj")), pattern)
    la = fitted(model, structure=structure)
    names = {str(name) for name in weight_names(la.layers)}
    assert names == {
        name.replace(".default.weight", "") for name, p in model.named_parameters() if p.requires_grad
    }
    close(la.logit_distribution(TEST), expected(model, answer_logits, trained(model)))


def test_of_a_classifier_with_a_trained_head():
    model = frozen(tiny.tiny_bert_classifier(3, modules_to_save=["classifier"]), "lora_A")
    train, test = (tiny.repad(each, "right", 7) for each in (TRAIN, TEST))
    close(
        fitted(model, Classes(), train=train).logit_distribution(test),
        expected(model, class_logits, trained(model)),
        1e-6,
    )
    lora = [p for name, p in model.named_parameters() if p.requires_grad and "lora" in name]
    la = fitted(model, Classes(), train=train, layers=lambda name: "modules_to_save" not in name)
    close(la.logit_distribution(test), expected(model, class_logits, lora), 1e-6)


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_of_dora(side):
    model = frozen(tiny.tiny_llama(use_dora=True), side)
    weights = [p for name, p in model.named_parameters() if p.requires_grad and "lora_magnitude" not in name]
    with through_the_norm():
        wanted = expected(model, answer_logits, weights)
    close(fitted(model).logit_distribution(TEST), wanted)


@pytest.mark.parametrize("pattern", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize(
    "structure",
    [KFAC(), KFAC(factors="sketch"), EKFAC(), Diagonal()],
    ids=["kfac", "sketch", "ekfac", "diagonal"],
)
def test_blocks_are_those_of_a_fit_to_all_weights(structure, pattern):
    """Blocks are independent: those of frozen weights are what a very large prior precision takes away."""
    model = frozen(tiny.tiny_llama(), pattern)
    found = fitted(model, structure=structure).logit_distribution(TEST)
    names = [name.replace(".default.weight", "") for name, p in model.named_parameters() if p.requires_grad]
    whole = fitted(model, structure=structure, trained="all")
    curvature = whole.posterior.curvature
    precisions = torch.tensor([1.0 if str(name) in names else 1e14 for name in curvature.names]).double()
    parts = fitted(model, structure=structure).posterior.covariance
    for index, name in enumerate(curvature.names):
        if str(name) in names:
            close([parts(*name)], [curvature.covariance(index, precisions)], 1e-6)
    assert all(each.isfinite().all() for each in found)


def test_a_refit_is_over_them_too():
    model = frozen(tiny.tiny_llama(), "lora_A")
    found = fitted(model, structure=Rows(columns=64, refit=True)).logit_distribution(TEST)
    whole = fitted(
        model, structure=Rows(columns=64, refit=True), trained="all", prior_precision={"A": 1e13, "B": 1.0}
    )
    close(found, whole.logit_distribution(TEST), 1e-5)


def test_samples_move_only_them(tmp_path):
    model = frozen(tiny.tiny_llama(), "lora_A")
    la = fitted(model)
    draws = la.sample(200)
    assert draws.deltas[0].shape[1:] == (4, 16)
    spread = draws.outputs(TEST)
    mean, covariance = la.logit_distribution(TEST)
    # a covariance of 200 draws is within 10 % an entry
    assert oracle.error(torch.stack([torch.cov(spread[:, n].mT) for n in range(len(mean))]), covariance) < 0.6
    folders = la.sample_adapters(tmp_path / "samples", 1, force=True)
    import peft

    state = peft.utils.load_peft_weights(str(folders[0]), device="cpu")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            same = torch.equal(state[name.replace(".default", "")], parameter.detach())
            assert same == ("lora_A" in name)


def test_what_was_trained_may_be_told():
    model = tiny.tiny_llama().requires_grad_(False)  # as loaded for inference: nobody knows
    weights = {name: p for name, p in model.named_parameters() if "lora_" in name}
    of_b = [p for name, p in weights.items() if "lora_B" in name]
    close(fitted(model).logit_distribution(TEST), expected(model, answer_logits, list(weights.values())))
    wanted = expected(model, answer_logits, of_b)
    by_predicate = fitted(model, trained=lambda name: name.endswith("lora_B"))
    close(by_predicate.logit_distribution(TEST), wanted)
    names = [str(name) for name in weight_names(by_predicate.layers)]
    close(fitted(model, trained=names).logit_distribution(TEST), wanted)
    assert "4 weights of the adapter were not trained" in by_predicate.summary()
    assert "q_proj.lora_A" not in by_predicate.summary().split("not trained")[0]


def test_freezing_all_afterwards_changes_nothing():
    """What was known when the posterior was made holds on, in predictions and in later fits."""
    model = frozen(tiny.tiny_llama(), "lora_A")
    la = fitted(model)
    expected = la.logit_distribution(TEST)
    model.requires_grad_(False)
    close(la.logit_distribution(TEST), expected, 1e-12)
    close(la.fit([TRAIN], progress=False).logit_distribution(TEST), expected, 1e-8)
    assert "4 weights of the adapter were not trained" in la.summary()


def test_what_cannot_be_is_refused():
    model = frozen(tiny.tiny_llama(), r"layers\.0")
    with pytest.raises(UnsupportedAdapterError, match=r"no weight of the selected layers.*trained='all'"):
        LaplaceLoRA(model, ANSWERS, layers=lambda name: "layers.0" in name)
    with pytest.raises(UnsupportedAdapterError, match="'lora_B', which is no weight"):
        LaplaceLoRA(model, ANSWERS, trained=["lora_B"])
    with pytest.raises(UnsupportedAdapterError, match="named by `trained`"):
        LaplaceLoRA(model, ANSWERS, trained=lambda name: False)
    with pytest.raises(ValueError, match=r"unknown keys \['A'\], of which no weight.*the keys are \['B'\]"):
        LaplaceLoRA(frozen(tiny.tiny_llama(), "lora_A"), ANSWERS, prior_precision={"A": 1.0, "B": 2.0})
    with pytest.raises(ValueError, match="trained must be None, 'all'"):
        LaplaceLoRA(model, ANSWERS, trained="lora_B")


def test_a_file_says_what_was_trained(tmp_path):
    """On a model whose flags say otherwise, and under another adapter's name."""
    model = frozen(tiny.tiny_llama(), r"layers\.0|lora_A")
    la = fitted(model)
    la.save(tmp_path)
    for flags in (lambda p: p.requires_grad_(False), lambda p: p.requires_grad_("lora" in str(p))):
        other = tiny.tiny_llama()
        for parameter in other.parameters():
            flags(parameter)
        close(LaplaceLoRA.load(tmp_path, other.eval()).logit_distribution(TEST), la.logit_distribution(TEST))
    other = tiny.tiny_llama()
    other.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight").data += 0.1
    with pytest.raises(StateError, match=r"q_proj\.lora_A"):
        LaplaceLoRA.load(tmp_path, other.eval())
