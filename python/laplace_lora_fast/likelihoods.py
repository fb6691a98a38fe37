"""Likelihoods: logits and targets to log-likelihood and Fisher cotangents, and from logit distributions to predictions.

Every function works on contrasts of logits, so that what softmax cannot see (a shift of all logits) has no influence.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from laplace_lora_fast.devices import to_device
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError


class Fisher(str, Enum):
    """Which Fisher information the curvature is made of."""

    EXACT = "exact"  # the GGN: the columns of a square root of the output Hessian
    MC = "mc"  # labels sampled from the model
    EMPIRICAL = "empirical"  # the given labels


class Link(str, Enum):
    """How a Gaussian over logits becomes class probabilities."""

    PROBIT = "probit"
    MC = "mc"
    BRIDGE = "bridge"
    MAP = "map"


class Likelihood(Protocol):
    """p(y | f) for a batch of outputs f [N, C]."""

    name: str

    def check(self, logits: Tensor) -> None:
        """Raises InvalidBatchError where C does not fit the likelihood."""

    def targets(self, labels: Tensor | None, logits: Tensor, checks: DeferredChecks) -> Tensor | None:
        """Labels in the form the other methods take, a copy; raises InvalidBatchError where they do not fit."""

    def log_likelihood(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum over the batch of log p(y | f), fp64 scalar, without terms in the noise scale."""

    def residual(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Gradient [N, C] of -log p(y | f) in f."""

    def sample(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Targets drawn from p(y | f)."""

    def hessian_root(self, logits: Tensor) -> Tensor:
        """S [N, C, K] with S S^T the Hessian of -log p(y | f) in f and K its rank."""


def fisher_cotangents(
    likelihood: Likelihood,
    fisher: Fisher,
    logits: Tensor,
    targets: Tensor | None,
    generator: torch.Generator,
    mc_samples: int = 1,
) -> Tensor:
    """Cotangents [N, C, K] whose backward passes give the output gradients of the chosen Fisher information.

    Args:
        likelihood: of the logits.
        fisher: exact (K = rank of the Hessian), mc (K = mc_samples) or empirical (K = 1).
        logits: [N, C], detached.
        targets: needed for the empirical Fisher.
        generator: draws the labels of the sampled Fisher, on the CPU.
        mc_samples: labels drawn per example.

    Raises:
        InvalidBatchError: the empirical Fisher was asked for without labels.
    """
    if fisher is Fisher.EXACT:
        return likelihood.hessian_root(logits)
    if fisher is Fisher.MC:
        draws = [likelihood.residual(logits, likelihood.sample(logits, generator)) for _ in range(mc_samples)]
        return torch.stack(draws, -1) / math.sqrt(mc_samples)
    if targets is None:
        raise InvalidBatchError("fisher='empirical' needs 'labels' in every batch")
    return likelihood.residual(logits, targets)[..., None]


class Categorical:
    """Softmax classification over C >= 2 classes; labels are class indices [N]."""

    name = "classification"

    def check(self, logits: Tensor) -> None:
        if logits.shape[1] < 2:
            raise InvalidBatchError(
                "classification needs at least 2 logits per example: use likelihood='regression'"
            )

    def targets(self, labels: Tensor | None, logits: Tensor, checks: DeferredChecks) -> Tensor | None:
        if labels is None:
            return None
        n, classes = logits.shape
        if labels.shape != (n,) or labels.is_floating_point():
            raise InvalidBatchError(
                f"'labels' must hold {n} class indices, got shape {tuple(labels.shape)} of {labels.dtype}"
            )
        valid = ((labels >= 0) & (labels < classes)).all()
        checks.require(valid, f"'labels' must lie in [0, {classes}): leave them out where there are none")
        targets = to_device(labels.long(), logits.device)
        return targets.clamp(0, classes - 1)  # in range even while a check is pending

    def log_likelihood(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.double().log_softmax(1).gather(1, targets[:, None]).sum()

    def residual(self, logits: Tensor, targets: Tensor) -> Tensor:
        classes = torch.arange(logits.shape[1], device=logits.device)
        return logits.softmax(1) - (targets[:, None] == classes).to(logits.dtype)

    def sample(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
        gumbel = -(-noise.clamp_min(torch.finfo(noise.dtype).tiny).log()).log()
        return (logits.double() + to_device(gumbel, logits.device)).argmax(1)

    def hessian_root(self, logits: Tensor) -> Tensor:
        """Columns of diag(q) Q with q = sqrt(p) and Q an orthonormal basis of q's complement, [N, C, C - 1].

        diag(p) - p p^T = diag(q) (I - q q^T) diag(q). Q is the Householder reflection that sends e_0 to -q without its
        first column; no entry is a difference of nearly equal numbers, so confident predictions keep their digits.
        """
        q = (0.5 * logits.log_softmax(1)).exp()
        first, rest = q[:, :1], q[:, 1:]
        v = torch.cat([first + 1, rest], 1)
        ratio = rest / (1 + first)
        root = -(q * v)[:, :, None] * ratio[:, None, :]
        # The diagonal is q_j (1 - q_j^2 / (1 + q_0)); write 1 - q_j^2 as the sum of the other probabilities.
        p = q * q
        others = (p @ (1 - torch.eye(p.shape[1], dtype=p.dtype, device=p.device)))[:, 1:]
        root.diagonal(offset=-1, dim1=1, dim2=2).copy_(rest * (first + others) / (1 + first))
        return root


class Gaussian:
    """Regression with unit noise; labels are real targets [N] or [N, C]. The noise scale enters outside."""

    name = "regression"

    def check(self, logits: Tensor) -> None:
        """Any number of outputs will do."""

    def targets(self, labels: Tensor | None, logits: Tensor, checks: DeferredChecks) -> Tensor | None:
        if labels is None:
            return None
        if labels.shape != logits.shape and labels.shape != logits.shape[:1]:
            raise InvalidBatchError(
                f"'labels' have shape {tuple(labels.shape)}, expected {tuple(logits.shape)}"
            )
        targets = labels.reshape(logits.shape[0], -1).to(logits.dtype)
        if targets.shape != logits.shape:
            raise InvalidBatchError(
                f"'labels' have shape {tuple(labels.shape)}, expected {tuple(logits.shape)}"
            )
        checks.require(targets.isfinite().all(), "'labels' hold a value that is not finite")
        return to_device(targets, logits.device).clone()  # a loader may fill the same memory again

    def log_likelihood(self, logits: Tensor, targets: Tensor) -> Tensor:
        return -0.5 * (logits.double() - targets.double()).square().sum()

    def residual(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits - targets

    def sample(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        return logits + to_device(noise.to(logits.dtype), logits.device)

    def hessian_root(self, logits: Tensor) -> Tensor:
        n, outputs = logits.shape
        return torch.eye(outputs, dtype=logits.dtype, device=logits.device).expand(n, outputs, outputs)


def contrast_cotangents(classes: int) -> Tensor:
    """Cotangents [C, C - 1] of the contrasts f_c - f_0, c = 1 .. C - 1."""
    return torch.cat([-torch.ones(1, classes - 1), torch.eye(classes - 1)])


def _all_contrasts(mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """Adds the contrast f_0 - f_0 = 0: mean [..., C], cov [..., C, C]."""
    return torch.nn.functional.pad(mean, (1, 0)), torch.nn.functional.pad(cov, (1, 0, 1, 0))


def probabilities(
    link: Link, mean: Tensor, cov: Tensor, n_samples: int, generator: torch.Generator
) -> Tensor:
    """Class probabilities of a Gaussian over contrasts.

    Args:
        link: how to integrate softmax over the Gaussian.
        mean: [..., N, C - 1] of f_c - f_0.
        cov: [..., N, C - 1, C - 1].
        n_samples: of the Monte-Carlo link.
        generator: of the Monte-Carlo link, on the CPU.

    Returns:
        [..., N, C], rows sum to one.
    """
    with torch.autocast(mean.device.type, enabled=False):
        if link is Link.MAP:
            return torch.nn.functional.pad(mean, (1, 0)).softmax(-1)
        if link is Link.PROBIT:
            return _probit(*_all_contrasts(mean, cov))
        if link is Link.BRIDGE:
            return _laplace_bridge(*_all_contrasts(mean, cov))
        return _monte_carlo(mean, cov, n_samples, generator)


def _probit(mean: Tensor, cov: Tensor) -> Tensor:
    """Pairwise probit: 1 / p_c = sum_i exp(-(m_c - m_i) / sqrt(1 + pi/8 var(f_c - f_i))), normalised.

    MacKay (1992) for two classes; the multi-class form is mf2 of Lu, Ie, Sha (2020), "Mean-field approximation to
    Gaussian-softmax integral". Scaling every logit by its own variance instead is not invariant to shifts.
    """
    variance = cov.diagonal(dim1=-2, dim2=-1)
    pairwise = (variance[..., :, None] + variance[..., None, :] - 2 * cov).clamp_min(0)
    difference = mean[..., :, None] - mean[..., None, :]
    return (-torch.logsumexp(-difference / (1 + math.pi / 8 * pairwise).sqrt(), -1)).softmax(-1)


def _laplace_bridge(mean: Tensor, cov: Tensor) -> Tensor:
    """Mean of the Dirichlet that the Laplace bridge assigns (Hobbhahn, Kristiadi, Hennig 2022, equation 12).

    The bridge lives on logits that sum to zero, so the Gaussian is projected there.
    """
    classes = mean.shape[-1]
    mean = mean - mean.mean(-1, keepdim=True)
    cov = cov - cov.mean(-1, keepdim=True)
    cov = cov - cov.mean(-2, keepdim=True)
    eps = torch.finfo(cov.dtype).eps
    variance = cov.diagonal(dim1=-2, dim2=-1).clamp_min(0)
    variance = variance / variance.mean(-1, keepdim=True).clamp_min(
        torch.finfo(cov.dtype).tiny
    )  # scale cancels below
    log_ratio = mean + torch.logsumexp(-mean, -1, keepdim=True) - 2 * math.log(classes)
    constant = torch.full_like(log_ratio, 1 - 2 / classes).log()
    log_alpha = torch.logaddexp(constant, log_ratio) - variance.clamp_min(eps).log()  # alpha may overflow
    return log_alpha.softmax(-1)


def _monte_carlo(mean: Tensor, cov: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}")
    values, vectors = torch.linalg.eigh(cov)  # unlike Cholesky, at ease with a singular covariance
    root = vectors * values.clamp_min(0).sqrt()[..., None, :]
    noise = torch.randn(n_samples, mean.shape[-1], generator=generator, dtype=torch.float64).to(mean)
    samples = mean[..., None, :] + noise @ root.mT  # the same noise for every example: no order in the result
    return torch.nn.functional.pad(samples, (1, 0)).softmax(-1).mean(-2)
