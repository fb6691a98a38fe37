"""The noise of a regression, chosen together with the prior precision: against searches of the dense objectives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from torch import Tensor, nn

from laplace_lora_fast import KFAC, Evidence, HeldOut, LaplaceLoRA, LeaveOneOut, Regression, Rows
from laplace_lora_fast.prior.tuning import Tuning
from laplace_lora_fast.structures import Structure
from tests import tiny
from tests.oracle import assert_close

TRUE_NOISE, TRUE_PRECISION = 0.3, 2.0
GRID = tuple(10 ** (exponent / 2) for exponent in range(-7, 8))
NOISES = torch.logspace(-2, 1, 1501, dtype=torch.float64)


class Small(nn.Module):
    """Two outputs of five inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@dataclass(frozen=True)
class Toy:
    """A model whose linearisation at its trained weights gives the data: y = f0 + J w + noise.

    Attributes:
        refit: f0 is the model without its adapter and w from the prior, as a refit has it; else f0 is the trained model
            and w from the posterior around it.
        n: training examples.
        seed: of everything drawn.
    """

    refit: bool
    n: int = 12
    seed: int = 0

    @cached_property
    def model(self) -> nn.Module:
        return tiny.adapt(Small(), targets=("first", "second"), r=2)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if "lora_" in name}

    def inputs(self, n: int, seed: int) -> Tensor:
        return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def start(self, x: Tensor) -> Tensor:
        """f0 [N, 2]."""
        with torch.no_grad():
            if not self.refit:
                return self.model(x=x)
            with self.model.disable_adapter():
                return self.model(x=x)

    def jacobian(self, x: Tensor) -> Tensor:
        """[N, 2, P] in all LoRA weights."""

        def outputs(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.model, weights, (), {"x": x})

        return torch.cat([part.flatten(2) for part in torch.func.jacrev(outputs)(self.weights).values()], 2)

    def data(self, n: int, seed: int) -> dict[str, Tensor]:
        x = self.inputs(n, seed)
        noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
        return {"x": x, "labels": self.start(x) + self.jacobian(x) @ self.truth + TRUE_NOISE * noise}

    @cached_property
    def truth(self) -> Tensor:
        rows = self.jacobian(self.inputs(self.n, 100 + self.seed)).flatten(0, 1)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(rows.shape[1], 1, generator=generator, dtype=torch.float64)
        precision = TRUE_PRECISION * torch.eye(rows.shape[1], dtype=torch.float64)
        if not self.refit:
            precision += rows.mT @ rows / TRUE_NOISE**2
        return torch.linalg.solve_triangular(torch.linalg.cholesky(precision).mT, drawn, upper=True)[:, 0]

    @cached_property
    def train(self) -> dict[str, Tensor]:
        return self.data(self.n, 100 + self.seed)

    @cached_property
    def held_out(self) -> dict[str, Tensor]:
        return self.data(10, 200 + self.seed)

    def fitted(self, structure: Structure) -> LaplaceLoRA:
        return LaplaceLoRA(self.model, Regression(), structure=structure).fit([self.train], progress=False)

    def posterior(self, mu: float, x: Tensor, train: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean [N, 2] and marginal variance [N, 2] at unit noise, by dense linear algebra over all weights."""
        rows, test = self.jacobian(train["x"]).flatten(0, 1), self.jacobian(x)
        precision = rows.mT @ rows + mu * torch.eye(rows.shape[1], dtype=rows.dtype)
        mean = self.start(x)
        if self.refit:
            residual = (train["labels"] - self.start(train["x"])).flatten()
            mean = mean + test @ torch.linalg.solve(precision, rows.mT @ residual)
        return mean, (test @ torch.linalg.inv(precision) @ test.mT).diagonal(dim1=1, dim2=2)


def normal(residual: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * (residual.square() / variance + (2 * torch.pi * variance).log())


def highest(objective: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float]:
    """Prior precision and noise of the highest value: grids of 13 x 13 around the best point, ever finer."""
    centre, width = torch.zeros(2, dtype=torch.float64), 14.0
    for _ in range(60):
        steps = torch.linspace(-width, width, 13, dtype=torch.float64)
        points = centre + torch.cartesian_prod(steps, steps)
        centre = points[objective(*points.exp().mT).argmax()]
        width *= 0.7
    precision, noise = centre.exp().tolist()
    return precision, noise


def trained_evidence(eigenvalues: Tensor, toy: Toy) -> Callable[[Tensor, Tensor], Tensor]:
    """Laplace's estimate around the trained model, of a curvature with these eigenvalues at unit noise."""
    residual = (toy.train["labels"] - toy.start(toy.train["x"])).flatten()
    distance = sum(float(weight.square().sum()) for weight in toy.weights.values())

    def objective(precision: Tensor, noise: Tensor) -> Tensor:
        fit = normal(residual, noise[:, None] ** 2).sum(1)
        log_det = (eigenvalues / (precision * noise**2)[:, None]).log1p().sum(1)
        return fit - 0.5 * (precision * distance + log_det)

    return objective


def refitted_evidence(toy: Toy) -> Callable[[Tensor, Tensor], Tensor]:
    """Log N(y; f0, J J^T / precision + noise^2)."""
    residual = (toy.train["labels"] - toy.start(toy.train["x"])).flatten()
    rows = toy.jacobian(toy.train["x"]).flatten(0, 1)
    values, vectors = torch.linalg.eigh(rows @ rows.mT)
    turned = vectors.mT @ residual
    return lambda precision, noise: normal(
        turned, values.clamp_min(0) / precision[:, None] + noise[:, None] ** 2
    ).sum(1)


@pytest.mark.parametrize("structure", [Rows(), KFAC(), Rows(refit=True)], ids=str)
def test_evidence_is_highest_at_the_chosen_pair(structure: Structure) -> None:
    toy = Toy(structure == Rows(refit=True))
    la = toy.fitted(structure)
    if toy.refit:
        objective = refitted_evidence(toy)
    elif structure == Rows():
        rows = toy.jacobian(toy.train["x"]).flatten(0, 1)
        objective = trained_evidence(torch.linalg.eigvalsh(rows @ rows.mT).clamp_min(0), toy)
    else:
        factors = [weight for layer in la.factors.values() for weight in (layer.A, layer.B)]
        dense = [torch.linalg.eigvalsh(torch.kron(f.gradient_factor, f.input_factor)) for f in factors]
        objective = trained_evidence(torch.cat(dense).clamp_min(0), toy)
    found = la.optimize_prior_precision("evidence"), la.sigma_noise
    assert found == pytest.approx(highest(objective), rel=1e-4)
    value = float(objective(*torch.tensor(found, dtype=torch.float64)[:, None]))
    assert la.log_marginal_likelihood().item() == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("per", ["side", "layer"])
def test_evidence_of_several_groups_is_stationary_in_each_and_in_the_noise(per: str) -> None:
    la = Toy(refit=False).fitted(Rows())
    best = la.optimize_prior_precision(Evidence(per=per))
    noise, top = la.sigma_noise, la.log_marginal_likelihood().item()

    def moved(key: str, by: float) -> float:
        la.sigma_noise = noise * math.exp(by) if key == "noise" else noise
        return la.log_marginal_likelihood(
            {k: v * math.exp(by) if k == key else v for k, v in best.items()}
        ).item()

    for key in (*best, "noise"):
        assert abs(moved(key, 1e-4) - moved(key, -1e-4)) / 2e-4 < 1e-5
        assert max(moved(key, 0.3), moved(key, -0.3)) < top


def test_noise_after_a_fit_is_the_best_at_the_prior_of_the_fit() -> None:
    toy = Toy(refit=False)
    la = LaplaceLoRA(toy.model, Regression(), structure="rows", prior_precision=TRUE_PRECISION)
    assert la.sigma_noise is None
    la.fit([toy.train], progress=False)
    rows = toy.jacobian(toy.train["x"]).flatten(0, 1)
    objective = trained_evidence(torch.linalg.eigvalsh(rows @ rows.mT).clamp_min(0), toy)
    values = objective(torch.full_like(NOISES, TRUE_PRECISION), NOISES)
    assert la.sigma_noise == pytest.approx(float(NOISES[values.argmax()]), rel=4e-3)


def nll_of_pairs(mean: Tensor, variance: Tensor, labels: Tensor) -> Tensor:
    """For every noise, of predictions with this variance at unit noise."""
    terms = normal(labels - mean, NOISES[:, None, None] ** 2 * (variance + 1))
    return -terms.sum(2).mean(1)


def assert_chosen(la: LaplaceLoRA, nll: dict[float, Tensor]) -> None:
    """The pair is the one with the lowest NLL among all products mu of the grid and a fine grid of noises."""
    mu = min(nll, key=lambda mu: float(nll[mu].min()))
    assert GRID[0] < mu < GRID[-1]
    assert la.prior_precision * la.sigma_noise**2 == pytest.approx(mu, rel=1e-12)
    assert la.sigma_noise == pytest.approx(float(NOISES[nll[mu].argmin()]), rel=4e-3)


@pytest.mark.parametrize("structure", [Rows(), Rows(refit=True)], ids=str)
def test_held_out_likelihood_is_highest_at_the_chosen_pair(structure: Structure) -> None:
    toy = Toy(structure.refit)
    la, held_out = toy.fitted(structure), toy.held_out
    la.optimize_prior_precision(HeldOut([held_out], grid=GRID), progress=False)
    nll = {mu: nll_of_pairs(*toy.posterior(mu, held_out["x"], toy.train), held_out["labels"]) for mu in GRID}
    assert_chosen(la, nll)
    mean, variance = toy.posterior(la.prior_precision * la.sigma_noise**2, held_out["x"], toy.train)
    assert_close(la.predict(held_out), mean, 1e-8)
    assert_close(la.predictive_variance(held_out), la.sigma_noise**2 * (variance + 1), 1e-8)


def test_left_out_likelihood_is_highest_at_the_chosen_pair() -> None:
    toy = Toy(refit=True)
    la, train = toy.fitted(Rows(refit=True)), toy.train
    la.optimize_prior_precision(LeaveOneOut(grid=GRID), progress=False)
    nll = {}
    for mu in GRID:
        left_out = []
        for n in range(toy.n):
            keep = torch.arange(toy.n) != n
            rest = {key: value[keep] for key, value in train.items()}
            left_out.append(toy.posterior(mu, train["x"][~keep], rest))
        mean, variance = (torch.cat(parts) for parts in zip(*left_out, strict=True))
        nll[mu] = nll_of_pairs(mean, variance, train["labels"])
    assert_chosen(la, nll)


@pytest.mark.parametrize("tuning", ["evidence", "leave_one_out", "held_out"])
def test_a_given_noise_is_kept(tuning: str) -> None:
    toy = Toy(refit=True)
    la = LaplaceLoRA(toy.model, Regression(noise=0.8), structure=Rows(refit=True))
    la.fit([toy.train], progress=False)
    way = {"held_out": HeldOut([toy.held_out])}.get(tuning, tuning)
    la.optimize_prior_precision(way, progress=False)
    assert la.sigma_noise == 0.8
    again = toy.fitted(Rows(refit=True))
    again.optimize_prior_precision(way, progress=False)
    assert again.sigma_noise != pytest.approx(0.8, rel=0.2)
    assert again.prior_precision != pytest.approx(la.prior_precision, rel=1e-3)


WAYS = {
    "evidence": lambda toy: Evidence(),
    "leave one out": lambda toy: LeaveOneOut(),
    "held out": lambda toy: HeldOut([toy.data(40, 300)]),
}


@pytest.mark.filterwarnings("ignore:the best prior precision lies on the edge")  # none at all may be best
@pytest.mark.parametrize(
    ("structure", "way"),
    [
        (Rows(refit=True), "evidence"),
        (Rows(refit=True), "leave one out"),
        (Rows(refit=True), "held out"),
        (Rows(), "held out"),
        (KFAC(), "held out"),
    ],
    ids=str,
)
def test_intervals_of_a_well_specified_model_cover_what_they_say(structure: Structure, way: str) -> None:
    """Over several drawn truths: 68 % within one standard deviation and 95 % within two."""
    scores, noises = [], []
    for seed in range(6):
        toy = Toy(structure == Rows(refit=True), n=40, seed=seed)
        la, test = toy.fitted(structure), toy.data(150, 400)
        tuning: Tuning = WAYS[way](toy)
        la.optimize_prior_precision(tuning, progress=False)
        found = la.predictions([test], progress=False)
        scores.append((found.labels - found.mean) / found.variance.sqrt())
        noises.append(la.sigma_noise)
    z = torch.cat(scores).abs()
    assert float((z < 1).double().mean()) == pytest.approx(0.683, abs=0.04)
    assert float((z < 2).double().mean()) == pytest.approx(0.954, abs=0.02)
    if structure == Rows(refit=True):
        assert math.exp(sum(map(math.log, noises)) / 6) == pytest.approx(TRUE_NOISE, rel=0.1)
