"""Fits of every kind to be saved, and all that is asked of one."""

from __future__ import annotations

import torch

from laplace_lora_fast import (
    EKFAC,
    KFAC,
    Answers,
    Classes,
    Diagonal,
    LaplaceLoRA,
    MonteCarlo,
    Outputs,
    Regression,
    Rows,
)
from laplace_lora_fast.likelihoods import Gaussian
from tests import tiny

ANSWERS = Answers(tiny.ANSWERS)
QKV = ("q_proj", "k_proj", "v_proj")
LAYER = "base_model.model.model.layers.1.self_attn.v_proj"


def ends(out, batch):
    return out.logits[:, 1, :3] - out.logits[:, 0, 3:6]  # real positions: the pads are on the right


def initial(model):
    return {k: 0.5 * v for k, v in model.state_dict().items() if "lora" in k}


CASES = {
    "ekfac": (lambda: tiny.tiny_llama(targets=(*QKV, "lm_head")), ANSWERS, EKFAC(rank=3)),
    "diagonal": (lambda: tiny.tiny_llama(targets=("v_proj", "lm_head")), ANSWERS, Diagonal()),
    "rows": (lambda: tiny.tiny_llama(targets=("v_proj", "lm_head")), ANSWERS, Rows()),
    "rows sketched": (
        lambda: tiny.tiny_llama(dtype=torch.bfloat16),
        ANSWERS,
        Rows(columns=5),
        {"seed": 3, "prior_precision": {"A": 0.3, "B": 2}},
    ),
    "rows regression": (
        lambda: tiny.tiny_bert_classifier(1),
        Regression(noise=0.4),
        Rows(),
        {"prior_mean": initial},
    ),
    "dense": (lambda: tiny.tiny_llama(targets=(*QKV, "lm_head")), ANSWERS, KFAC()),
    "expand": (lambda: tiny.tiny_llama(targets=QKV), ANSWERS, KFAC(tokens="expand", fisher="empirical")),
    "rank": (lambda: tiny.tiny_llama(targets=QKV), ANSWERS, KFAC(rank=3, fisher=MonteCarlo(2)), {"seed": 7}),
    "sketch": (lambda: tiny.tiny_llama(targets=QKV), ANSWERS, KFAC(factors="sketch", columns=6, rank=2)),
    "fp32": (lambda: tiny.tiny_llama(dtype=torch.float32), ANSWERS, KFAC()),
    "low precision": (lambda: tiny.tiny_llama(dtype=torch.bfloat16), ANSWERS, KFAC()),
    "precision by side": (tiny.tiny_llama, ANSWERS, KFAC(), {"prior_precision": {"A": 0.3, "B": 1e-7}}),
    "prior mean": (
        lambda: tiny.tiny_llama(targets=("v_proj", "lm_head")),
        ANSWERS,
        KFAC(),
        {"prior_mean": initial},
    ),
    "regression": (
        lambda: tiny.tiny_llama_classifier(1, targets=("q_proj", "score")),
        Regression(noise=0.37),
        KFAC(),
    ),
    "regression, tuned noise": (lambda: tiny.tiny_llama_classifier(1), Regression(), KFAC()),
    "classifier": (lambda: tiny.tiny_bert_classifier(3), Classes(), KFAC()),
    "outputs": (tiny.tiny_llama, Outputs(ends), KFAC()),
    "outputs regression": (tiny.tiny_llama, Outputs(ends, Gaussian(noise=0.8)), Rows()),
    "budget": (tiny.tiny_llama, ANSWERS, "auto", {"budget": 10**8, "layers": [LAYER]}),
}


def build(name):
    make, task, structure, *more = CASES[name]
    model, options = make(), dict(*more)
    if "prior_mean" in options:
        options["prior_mean"] = options["prior_mean"](model)
    la = LaplaceLoRA(model, task, structure=structure, **options)
    return la.fit([data_for(name, seed) for seed in (1, 2)], progress=False), model


def data_for(name, seed):
    batch = tiny.batch(4, 5, seed=seed, padding="right", classes=0 if "regression" in name else 3)
    if name == "outputs regression":
        batch["labels"] = torch.randn(
            4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
    return batch


def with_code(name):
    """The task, where a file cannot hold it."""
    task = CASES[name][1]
    return task if isinstance(task, Outputs) else None


def build_model():
    return CASES["dense"][0]()


def everything(la):
    batch = tiny.batch(3, 5, seed=3, padding="right", labels=False)
    out = {"evidence": la.log_marginal_likelihood(), "precision": la.posterior.prior_precision}
    out["mean"], out["covariance"] = la.logit_distribution(batch)
    if la.likelihood.has_noise:
        out["prediction"], out["variance"] = la.predict(batch), la.predictive_variance(batch)
    for link in (*la.likelihood.links, "map") if la.likelihood.links else ():
        out[link] = la.predict(batch, link_approx=link)
    for name, layer in la.factors.items() if type(la.structure) is KFAC else ():
        for side, weight in (("A", layer.A), ("B", layer.B)):
            out[name, side, "input"], out[name, side, "gradient"] = (
                weight.input_factor,
                weight.gradient_factor,
            )
    for index, sample in enumerate(la.posterior.sample(2, torch.Generator().manual_seed(1))):
        out["sample", index] = sample
    return out


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype, key
        assert torch.equal(got[key], value), key
