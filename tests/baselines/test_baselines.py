"""Every baseline against its definition, written out on models small enough to enumerate."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from laplace_lora_fast import KFAC, Classes, Diagonal, Evidence, HeldOut, LaplaceLoRA, LeaveOneOut, Rows
from laplace_lora_fast.baselines import (
    MAP,
    BLoB,
    Case,
    CrossFittedTemperature,
    Ensemble,
    Laplace,
    MCDropout,
    Temperature,
    TrainingFree,
)
from laplace_lora_fast.baselines.by_backprop import drawn, kl
from laplace_lora_fast.baselines.training_free import moved, noise
from laplace_lora_fast.errors import InvalidBatchError
from laplace_lora_fast.evaluation.metrics import temperature_scale
from laplace_lora_fast.model.lora import lora_layers
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore::laplace_lora_fast.errors.LaplaceWarning")


class Small(nn.Module):
    """A network with dropout between its layers."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 3), nn.Linear(3, 2)
        self.dropout = nn.Dropout(rate)
        self.second.weight.data *= 6  # so that the softmax is no line

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(torch.tanh(self.first(x))))


def data(n: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    labels = (x[:, 0] + 0.5 * torch.randn(n, generator=generator) > 0).long()
    return [{"x": x[:4], "labels": labels[:4]}, {"x": x[4:], "labels": labels[4:]}]


def model(seed: int = 1, rate: float = 0.0) -> nn.Module:
    return tiny.adapt(Small(rate), targets=("first", "second"), r=2, seed=seed)


TRAIN, HELD_OUT, TEST = data(10, 0), data(12, 1), data(7, 2)
X, LABELS = (torch.cat([batch[key] for batch in TEST]) for key in ("x", "labels"))


def case(seed: int = 1, rate: float = 0.0) -> Case:
    return Case(model(seed, rate), Classes(), TRAIN, HELD_OUT)


def plain(network: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return network.eval()(x)


def test_map_and_temperature():
    ours = case()
    found = MAP().fit(ours)(TEST)
    torch.testing.assert_close(found.probs, plain(ours.model).softmax(1))
    assert torch.equal(found.labels, LABELS)
    held_out, labels = (torch.cat([batch[key] for batch in HELD_OUT]) for key in ("x", "labels"))
    temperature = temperature_scale(plain(ours.model, held_out), labels)
    scaled = Temperature().fit(ours)(TEST).probs
    torch.testing.assert_close(scaled, (plain(ours.model) / temperature).softmax(1))
    with pytest.raises(ValueError, match="held_out"):
        Temperature().fit(Case(ours.model, Classes(), TRAIN))


def test_a_cross_fitted_temperature_sees_the_folds_only():
    rows = [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in TRAIN
        for i in range(len(batch["x"]))
    ]
    baseline = CrossFittedTemperature(lambda some: model(len(some)), rows, folds=5)
    found = baseline.fit(Case(model(), Classes(), TRAIN))(TEST)
    x, labels = (torch.cat([row[key] for row in rows]) for key in ("x", "labels"))
    temperature = temperature_scale(plain(model(8), x), labels)  # every fold of 10 rows leaves 8
    torch.testing.assert_close(found.probs, (plain(model()) / temperature).softmax(1))


def test_an_ensemble_is_the_mean_of_probabilities():
    others = [model(2), model(3)]
    found = Ensemble(others).fit(case())(TEST).probs
    expected = torch.stack([plain(each).softmax(1) for each in (model(1), *others)]).mean(0)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="others"):
        Ensemble([])


def test_mc_dropout_is_the_mean_over_masks():
    """All masks of three units, each with its probability."""
    ours = case(rate=0.3)
    network = ours.model.get_base_model()
    expected = torch.zeros(len(X), 2, dtype=torch.float64)
    with torch.no_grad():
        hidden = torch.tanh(network.first(X))
        for mask in itertools.product([0.0, 1.0], repeat=3):
            kept = torch.tensor(mask, dtype=torch.float64)
            weight = math.prod(0.7 if unit else 0.3 for unit in mask)
            expected += weight * network.second(hidden * kept / 0.7).softmax(1)
    found = MCDropout(samples=4000).fit(ours)(TEST).probs
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    assert (found - plain(ours.model).softmax(1)).abs().max() > 0.02  # it is not the model without
    assert torch.equal(MCDropout(3).fit(ours)(TEST).probs, MCDropout(3).fit(ours)(TEST).probs)
    with pytest.raises(ValueError, match="rates are 0"):
        MCDropout().fit(case())


@pytest.mark.parametrize(
    "baseline",
    [
        Laplace(),
        Laplace(KFAC()),
        Laplace(KFAC(tokens="paper"), tuning=Evidence()),
        Laplace(Diagonal()),
        Laplace(layers="last"),
        Laplace(Rows(refit=True), tuning=LeaveOneOut()),
    ],
    ids=str,
)
def test_laplace_is_the_posterior_with_its_tuning(baseline):
    ours = case()
    found = baseline.fit(ours)(TEST).probs
    la = LaplaceLoRA(ours.model, Classes(), structure=baseline.structure, layers=baseline.layers)
    la.fit(TRAIN, progress=False)
    la.optimize_prior_precision(baseline.tuning or HeldOut(HELD_OUT), progress=False)
    torch.testing.assert_close(found, la.predictions(TEST, progress=False).probs)
    assert baseline.needs_held_out == (baseline.tuning is None)


def layers_of(network: nn.Module):
    return lora_layers(network, Classes().head(network))


def test_training_free_noise_is_isotropic_in_the_columns_of_b():
    """The product's step has covariance sigma^2 U U^T in each of its columns, and the columns are independent."""
    layer = layers_of(model())[0]
    b = layer.weights.B.double()
    generator = torch.Generator().manual_seed(0)
    steps = torch.stack([b @ noise(layer, 0.3, generator) for _ in range(20_000)])  # [n, d_out, d_in]
    u = torch.linalg.svd(b, full_matrices=False).U
    covariance = torch.einsum("nix,njx->ij", steps, steps) / (len(steps) * steps.shape[2])
    torch.testing.assert_close(covariance, 0.09 * u @ u.mT, rtol=0, atol=0.002)
    across = torch.einsum("nix,niy->xy", steps, steps) / len(steps)
    assert (across - across.diag().diag()).abs().max() < 0.005


def test_training_free_predictions_are_means_over_moved_weights():
    ours, width = case(), 0.4
    baseline = TrainingFree(samples=3)
    layers = layers_of(ours.model)
    found = baseline._predicted(ours, layers, width, TEST).probs
    generator, expected = torch.Generator().manual_seed(0), []
    for _ in range(3):
        network = model()
        steps = [noise(layer, width, generator) for layer in layers]
        for layer, step in zip(layers_of(network), steps, strict=True):
            layer.adapter_parts[0].weight.data += step
        expected.append(plain(network).softmax(1))
    torch.testing.assert_close(found, torch.stack(expected).mean(0))
    with moved(layers, [noise(layer, width, generator) for layer in layers]):
        pass
    torch.testing.assert_close(plain(ours.model), plain(model()))  # nothing is left


def test_training_free_takes_the_widest_that_held_out_data_bear():
    anchor = [{**batch, "labels": plain(model(), batch["x"]).argmax(1)} for batch in HELD_OUT]
    ours = Case(model(), Classes(), TRAIN, anchor)
    baseline = TrainingFree(samples=20, tolerance=0.02)
    layers = layers_of(ours.model)
    width = baseline.width(ours, layers)

    def nll(value: float) -> float:
        return baseline._predicted(ours, layers, value, anchor).metrics().nll

    bound = 1.02 * nll(0.0)
    assert 0 < width < 1
    assert nll(width) <= bound
    assert nll(width * 1.02) > bound
    assert all(nll(width * share) <= bound for share in (0.25, 0.5, 0.75))
    assert TrainingFree(samples=5, largest=1e-6).width(ours, layers) == 1e-6


def test_blob_divergence():
    generator = torch.Generator().manual_seed(0)
    mean, sd = torch.randn(3, 4, generator=generator), torch.rand(3, 4, generator=generator) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, sd), normal(0.0, 0.7)).sum()
    torch.testing.assert_close(kl(mean, sd, 0.7), expected)


def test_blob_draws_one_adapter_a_sequence():
    """Each is a draw from N(M, G^4), the same for all tokens of a sequence, another one for the next."""
    network = model()
    layer = layers_of(network)[0]
    part, width = layer.adapter_parts[0], torch.rand(layer.weights.A.shape, dtype=torch.float64) + 0.5
    x = torch.eye(5, dtype=torch.float64).expand(2, 5, 5)  # tokens read off a sequence's lora_A
    torch.manual_seed(0)
    with drawn([layer], [width.sqrt()]):
        steps = torch.stack([part(x).detach().mT - layer.weights.A for _ in range(4000)])  # [n, S, r, d_in]
    assert steps.mean(0).abs().max() < 0.1
    torch.testing.assert_close(steps.std(0), width.expand(2, -1, -1), rtol=0.05, atol=0)
    assert (steps[:, 0] * steps[:, 1]).mean(0).abs().max() < 0.15
    flat = steps[:, 0].flatten(1) / width.flatten()
    assert (flat.mT.cov() - torch.eye(10, dtype=torch.float64)).abs().max() < 0.1
    assert torch.equal(part(x), part(x))  # no hook is left


def test_blob_takes_the_steps_of_its_definition():
    """Two batches, written out with a weight matrix a sequence; only the likelihood moves lora_B."""
    baseline = BLoB(model, epochs=1, learning_rate=0.02, kl_learning_rate=0.1, samples=2)
    ours = Case(model(7), Classes(), TRAIN, seed=3)
    found = baseline.fit(ours)(TEST).probs

    torch.manual_seed(3)
    network = model(3)
    layers = layers_of(network)
    means = [layer.adapter_parts[0].weight for layer in layers]
    roots = [torch.empty_like(m).uniform_(0.05 / math.sqrt(2), 0.05).requires_grad_() for m in means]
    adam = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad] + roots, lr=0.02)
    for i, batch in enumerate(TRAIN):
        x, parts = batch["x"], []
        first, second = (layer.module for layer in layers)
        draws = []
        for root in roots:
            e = torch.randn_like(root)
            s, t = (torch.randint(2, (len(x), d)).double() * 2 - 1 for d in (root.shape[1], root.shape[0]))
            draws.append((e, s, t))
        for n in range(len(x)):
            h = x[n]
            for layer, root, (e, s, t), act in zip(
                (first, second), roots, draws, (torch.tanh, lambda v: v), strict=True
            ):
                a = layer.lora_A["default"].weight + torch.outer(t[n], s[n]) * e * root**2
                delta = layer.scaling["default"] * layer.lora_B["default"].weight @ a
                h = act(layer.base_layer(h) + delta @ h)
            parts.append(h)
        adam.zero_grad()
        nn.functional.cross_entropy(torch.stack(parts), batch["labels"]).backward()
        adam.step()
        divergence = sum(kl(m, g**2, 0.2) for m, g in zip(means, roots, strict=True)) * (1 / 3, 2 / 3)[i]
        steps = torch.autograd.grad(divergence, [*means, *roots])
        with torch.no_grad():
            for weight, step in zip([*means, *roots], steps, strict=True):
                weight -= 0.1 * step

    torch.manual_seed(3)
    expected = []
    for _ in range(2):
        with moved(layers, [root.detach() ** 2 * torch.randn_like(root) for root in roots]):
            expected.append(plain(network).softmax(1))
    torch.testing.assert_close(found, torch.stack(expected).mean(0))
    mean = BLoB(model, epochs=1, learning_rate=0.02, kl_learning_rate=0.1, samples=0).fit(ours)(TEST).probs
    torch.testing.assert_close(mean, plain(network).softmax(1))


def test_blob_keeps_the_random_state_and_asks_for_labels():
    ours, before = case(), torch.get_rng_state()
    BLoB(lambda seed: ours.model, epochs=1).fit(ours)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(InvalidBatchError, match="labels"):
        BLoB(model).fit(Case(model(), Classes(), [{"x": X}]))
    with pytest.raises(ValueError, match="epochs"):
        BLoB(model, epochs=0)
