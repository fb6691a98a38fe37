"""Independent labels against the dense posterior of the same logits, and against quadrature."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from laplace_lora_fast import HeldOut, InvalidBatchError, LaplaceLoRA, MultiLabel, Rows
from laplace_lora_fast.errors import DeferredChecks
from laplace_lora_fast.likelihoods import Bernoulli
from tests import tiny
from tests.oracle import assert_close


def data(n: int = 6, seed: int = 0) -> tiny.Batch:
    batch = tiny.batch(n, length=6, seed=seed, padding="right")
    generator = torch.Generator().manual_seed(seed)
    return batch | {"labels": torch.randint(0, 2, (n, 3), generator=generator)}


def logits_of(model, batch, row):
    keep = batch["attention_mask"][row].bool()
    return model(input_ids=batch["input_ids"][row][keep][None]).logits[0]


def test_against_the_dense_posterior() -> None:
    model = tiny.tiny_llama_classifier(3).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    weights = [p for name, p in model.named_parameters() if "lora_" in name]
    train, test = data(), data(3, 1)

    def rows(batch, n):
        f = logits_of(model, batch, n)
        grads = [torch.autograd.grad(each, weights, retain_graph=True) for each in f]
        return f.detach(), torch.stack([torch.cat([g.flatten() for g in each]) for each in grads])

    hessian = 0.8 * torch.eye(sum(w.numel() for w in weights), dtype=torch.float64)
    log_likelihood = 0.0
    for n in range(6):
        f, J = rows(train, n)
        p = f.sigmoid()
        hessian += J.mT @ torch.diag(p * (1 - p)) @ J
        y = train["labels"][n].double()
        log_likelihood += (y * p.log() + (1 - y) * (1 - p).log()).sum()
    la = LaplaceLoRA(model, MultiLabel(), structure=Rows(columns=64), prior_precision=0.8)
    la.fit(tiny.split(train, 4), progress=False)
    norm = sum(w.detach().square().sum() for w in weights)
    expected = log_likelihood - 0.5 * (0.8 * norm + hessian.logdet() - len(hessian) * math.log(0.8))
    assert_close(la.log_marginal_likelihood(), expected, 1e-9)
    found = la.predict(test)
    for n in range(3):
        f, J = rows(test, n)
        v = (J @ torch.linalg.inv(hessian) @ J.mT).diagonal()
        assert_close(found[n], (f / (1 + math.pi / 8 * v).sqrt()).sigmoid(), 1e-9)
    assert_close(
        la.predict(test, link_approx="map"), torch.stack([rows(test, n)[0] for n in range(3)]).sigmoid(), 1e-9
    )
    sampled = la.predict(test, link_approx="mc", n_samples=4000)
    assert (sampled - found).abs().max() < 0.03
    scores = la.predictions(tiny.split(test, 2), progress=False).metrics()
    y = test["labels"].double()
    nll = -(y * found.log() + (1 - y) * (1 - found).log()).sum(1).mean()
    assert scores.nll == pytest.approx(nll.item(), rel=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the grid's edge: the labels are noise
        assert la.optimize_prior_precision(HeldOut([test]), progress=False) > 0


def test_root_and_residual_are_derivatives() -> None:
    f = torch.tensor([[-40.0, -1.0, 0.0, 3.0, 40.0]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0.0, 1, 1, 0, 1]], dtype=torch.float64)
    likelihood = Bernoulli()
    (gradient,) = torch.autograd.grad(-likelihood.log_likelihood(f, y), f)
    assert_close(likelihood.residual(f, y), gradient, 1e-12)
    root = likelihood.hessian_root(f.detach())[0].diagonal()
    p = f.detach()[0].sigmoid()
    assert torch.allclose(root.square(), p * (-f.detach()[0]).sigmoid(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("labels", [torch.tensor([[0, 1, 2]]), torch.tensor([1, 0])])
def test_labels_that_are_not_zeros_and_ones(labels: torch.Tensor) -> None:
    with pytest.raises(InvalidBatchError, match="zeros and ones"):
        Bernoulli().targets(labels, torch.zeros(len(labels), 3), DeferredChecks())


def test_a_model_that_says_what_it_was_trained_for() -> None:
    model = tiny.tiny_llama_classifier(3, config={"problem_type": "multi_label_classification"})
    with pytest.raises(ValueError, match=r"MultiLabel\(\), not Classes"):
        LaplaceLoRA(model, "classes")
    assert LaplaceLoRA(model, "multi_label").task == MultiLabel()


@pytest.mark.parametrize("link", Bernoulli.links)
@pytest.mark.parametrize("margin", [10.0, 20.0, 60.0, -60.0])
def test_score_of_a_sure_and_wrong_label(link, margin):
    """In fp32, 1 - sigmoid(17) is 0: its logarithm would be infinite under every prior."""
    label = torch.tensor([[float(margin < 0)]])
    score, _ = Bernoulli().score(
        torch.tensor([[margin]]), torch.full((1, 1, 1, 1), 1e-12), label, link, 10, torch.Generator(), None
    )
    assert_close(score, torch.tensor([abs(margin)], dtype=torch.float64), 1e-4)
