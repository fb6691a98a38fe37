"""The caller's autocast holds for the model's forward pass, as in training, and for nothing computed from it."""

from __future__ import annotations

import pytest
import torch

from laplace_lora_fast import KFAC, LaplaceLoRA
from laplace_lora_fast.likelihoods.links import LINKS, probabilities
from tests import tiny
from tests.model.taps import ANSWERS, Recorder, read, real, tapped


def test_it_runs_the_model_but_not_the_curvature():
    model, batch = tiny.tiny_llama(dtype=torch.float32, targets=("q_proj", "lm_head")), tiny.batch(4)
    recorder = Recorder()
    tap, head = tapped(model, ANSWERS, recorder)
    with torch.autocast("cpu", torch.bfloat16):
        with tap:
            logits = tap.forward(read(head, batch)).detach()
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
        la = LaplaceLoRA(model, ANSWERS, structure=KFAC(tokens="expand")).fit([batch], progress=False)
        mean, _ = la.logit_distribution(batch)
        factors, mapped = la.factors, la.predict(batch, link_approx="map")
    assert logits.dtype == torch.bfloat16  # the model ran as the caller asked
    for index, layer in enumerate(tap.layers):
        x, mask = recorder.inputs[tap.shared_inputs[index]]
        rows = real(x, mask).flatten(0, 1)
        expected = rows.mT @ rows / (len(rows) if mask is None else int(mask.sum()))
        got = factors[layer.name].A.input_factor.double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean, logits.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mapped, logits.float().softmax(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("link", LINKS)
def test_it_does_not_reach_links(link):
    mean, root = torch.randn(5, 3), torch.randn(5, 3, 3)
    cov = (root.double() @ root.double().mT).float()
    expected = probabilities(link, mean, cov, 50, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        got = probabilities(link, mean, cov, 50, torch.Generator().manual_seed(0))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factors", [{"factors": "dense"}, {"factors": "sketch", "columns": 16}], ids=str)
def test_it_does_not_reach_what_is_left_of_a_fit(factors):
    """Factors keep a few rows back until the end, after the last pass."""
    model = tiny.tiny_llama(dtype=torch.float32, targets=("lm_head",))
    loader, recorder, xs = [tiny.batch(12), tiny.batch(3)], Recorder(), []
    tap, head = tapped(model, ANSWERS, recorder)
    with torch.autocast("cpu", torch.bfloat16):
        with tap:
            for batch in loader:
                tap.forward(read(head, batch))
                xs.append(recorder.inputs[0][0][:, 0])
        la = LaplaceLoRA(model, ANSWERS, structure=KFAC(rank=16, **factors)).fit(loader, progress=False)
    rows = torch.cat(xs).double()
    got = la.factors["base_model.model.lm_head"].A.input_factor.double()
    torch.testing.assert_close(got, rows.mT @ rows / 15, rtol=1e-5, atol=1e-5)


def test_it_does_not_reach_samples():
    model, batch = tiny.tiny_llama(dtype=torch.float32), tiny.batch(4)
    la = LaplaceLoRA(model, ANSWERS, structure="kfac").fit([batch], progress=False)
    expected = la.posterior.sample(2, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        sampled = la.posterior.sample(2, torch.Generator().manual_seed(0))
    for one, other in zip(sampled, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
