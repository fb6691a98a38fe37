"""What is replayed of the integrations with laplace-torch and bayesian-lora; the former needs laplace-torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from laplace_lora_fast import KFAC, Answers, LaplaceLoRA
from laplace_lora_fast.integrations import bayesian_lora
from tests import tiny
from tests.replay.cases import RANK, Quantities

TRAIN = tiny.batch(7, length=6, seed=1)
TEST = tiny.batch(3, length=5, seed=3)


class Decoder(nn.Module):
    """One argument, the batch; logits [N, 3] of the answers at the last real position."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny.tiny_llama(r=RANK)

    def forward(self, batch: tiny.Batch) -> Tensor:
        return last_real(self.model, batch)


def last_real(model: nn.Module, batch: tiny.Batch) -> Tensor:
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions).logits
    return logits[torch.arange(len(mask)), mask.cumsum(1).argmax(1)][:, list(tiny.ANSWERS)]


def network() -> nn.Module:
    """Linear layers with and without bias, no LoRA."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False), nn.Tanh(), nn.Linear(2, 3)
    ).double()


def points(regression: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    return x, torch.randn(7, 3, generator=generator, dtype=torch.float64) if regression else torch.arange(
        7
    ) % 3


@contextmanager
def fp64() -> Iterator[None]:
    """laplace-torch makes tensors of the default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def flat(factors: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.cat([factor.flatten() for pair in factors for factor in pair])


def laplace_torch_backends() -> Quantities:
    """Kron, diagonal, full, Jacobians and gradients of a network, and of a decoder with pads."""
    from laplace_lora_fast.integrations.laplace_torch import FastEF, FastGGN

    found: Quantities = {}
    with fp64():
        for likelihood in ("classification", "regression"):
            model, (x, y) = network(), points(likelihood == "regression")
            backends = {
                "ggn": FastGGN(model, likelihood),
                "mc": FastGGN(model, likelihood, stochastic=True),
                "ef": FastEF(model, likelihood),
            }
            for name, backend in backends.items():
                loss, kron = backend.kron(x, y, 7)
                found[f"{likelihood}-{name}-loss"] = loss
                found[f"{likelihood}-{name}-kron"] = flat(kron.kfacs)
                found[f"{likelihood}-{name}-diag"] = backend.diag(x, y)[1]
                found[f"{likelihood}-{name}-full"] = backend.full(x, y)[1]
            found[f"{likelihood}-jacobians"], found[f"{likelihood}-outputs"] = backends["ggn"].jacobians(x)
            found[f"{likelihood}-gradients"] = backends["ef"].gradients(x, y)[0]
        for mode in ("reduce", "expand"):
            for name, kind in (("ggn", FastGGN), ("ef", FastEF)):
                backend = kind(lora_alone(Decoder()), "classification", kfac_approx=mode)
                found[f"decoder-{name}-{mode}"] = flat(backend.kron(TRAIN, TRAIN["labels"], 20)[1].kfacs)
        backend = FastGGN(lora_alone(Decoder()), "classification")
        found["decoder-diag"] = backend.diag(TRAIN, TRAIN["labels"])[1]
        found["decoder-jacobians"] = backend.jacobians(TEST)[0]
    return {name: value.detach() for name, value in found.items()}


def laplace_torch_lowrank() -> Quantities:
    """`lowrank_kron` with complete and with sketched factors."""
    from laplace import Laplace

    from laplace_lora_fast.integrations import laplace_torch

    found: Quantities = {}
    with fp64():
        jacobians = laplace_torch.FastGGN(lora_alone(Decoder()), "classification").jacobians(TEST)[0]
        for name, options in (
            ("complete", {}),
            ("empirical", {"backend": laplace_torch.FastEF}),
            ("sketch", {"structure": KFAC(tokens="expand", factors="sketch", columns=8)}),
        ):
            la = Laplace(lora_alone(Decoder()), "classification", "all", "lowrank_kron", **options)
            la.fit(tiny.split(TRAIN, 4))
            la.prior_precision = torch.linspace(0.5, 2, la.n_layers)
            mean, covariance = la._glm_predictive_distribution(TEST)
            found |= {
                f"{name}-functional-variance": la.functional_variance(jacobians),
                f"{name}-log-det": la.log_det_posterior_precision,
                f"{name}-log-det-ratio": la.log_det_ratio,
                f"{name}-log-marginal-likelihood": la.log_marginal_likelihood(),
                f"{name}-diagonal": la.posterior_precision.diag(),
                f"{name}-mean": mean,
                f"{name}-covariance": covariance,
                f"{name}-predict": la(TEST, link_approx="probit"),
                f"{name}-samples": la.sample(2, generator=torch.Generator().manual_seed(0)),
            }
    return {name: value.detach() for name, value in found.items()}


def laplace_torch_convert() -> Quantities:
    """A fit in laplace-torch's form."""
    from laplace_lora_fast.integrations.laplace_torch import to_state_dict

    la = LaplaceLoRA(tiny.tiny_llama(r=RANK), Answers(tiny.ANSWERS), structure=KFAC(), prior_precision=0.7)
    state = to_state_dict(la.fit([TRAIN], progress=False))
    return {
        "mean": state["mean"],
        "kron": flat(state["H"]),
        "loss": state["loss"],
        "prior-precision": state["prior_precision"],
    }


def bayesian_lora_functions() -> Quantities:
    """From factors to evidence and variance; low-rank roots as their products, a root is unique up to signs."""
    found: Quantities = {}
    model = tiny.tiny_llama(r=RANK).eval()
    evidence_at = torch.tensor(-7.0, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    for compat in (False, True):
        for n_kfac, threshold in ((16, 12), (4, 6)):  # with the complete spectrum, and without
            torch.manual_seed(5)  # compat draws labels from the global generator
            factors = bayesian_lora.calculate_kronecker_factors(
                model, last_real, tiny.split(TRAIN, 4), n_kfac, threshold, ["lora"], compat=compat
            )
            name = f"{'compat' if compat else 'default'}-{n_kfac}"
            found[f"{name}-factors"] = flat(
                [[f if len(f) < threshold else f @ f.mT for f in pair] for pair in factors.values()]
            )
            narrow = {key: pair for key, pair in factors.items() if "q_proj" in key}  # sides of one size
            roots = bayesian_lora.cholesky_decompose_small_factors(
                narrow, threshold, "cpu", torch.float64, compat=compat
            )
            log_likelihood, s2 = evidence_at
            found[f"{name}-evidence"] = bayesian_lora.model_evidence(
                model, log_likelihood, roots, RANK, n_kfac, s2, compat=compat
            )
            jacobian, mean = bayesian_lora.jacobian_mean(
                model, TEST, torch.tensor(tiny.ANSWERS), compat=compat
            )
            found[f"{name}-mean"] = mean
            found[f"{name}-jacobian"] = jacobian[
                "base_model.model.model.layers.1.self_attn.v_proj.lora_A.default.weight"
            ]
            found[f"{name}-variance"] = bayesian_lora.variance(
                None, jacobian, roots, s2, 3, RANK, n_kfac, "cpu"
            )
    return found


def lora_alone(model: nn.Module) -> nn.Module:
    """Only LoRA weights require grad."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


INTEGRATIONS = {
    "laplace-torch-backends": laplace_torch_backends,
    "laplace-torch-lowrank": laplace_torch_lowrank,
    "laplace-torch-convert": laplace_torch_convert,
    "bayesian-lora": bayesian_lora_functions,
}
