"""Links: how a Gaussian over contrasts of logits becomes class probabilities.

A plug: one function and one `link` line, here or anywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from laplace_lora_fast.options import check_choice

Link = Callable[[Tensor, Tensor, int, torch.Generator], Tensor]

_LINKS: dict[str, Link] = {}
LINKS: list[str] = []  # names, the default first; they grow as links are registered
SAMPLING_LINKS: list[str] = []


def link(name: str, function: Link, samples: bool = False) -> None:
    """Registers a link, which softmax tasks take from then on as `link_approx`.

    Args:
        name: of the link.
        function: (mean [.., N, C - 1], cov [.., N, C - 1, C - 1], n_samples, generator) -> [.., N, C]; the Gaussian is
            that of the contrasts f_c - f_0.
        samples: whether it looks at `n_samples`.
    """
    _LINKS[name] = function
    for names, belongs in ((LINKS, True), (SAMPLING_LINKS, samples)):
        if belongs and name not in names:
            names.append(name)
        elif not belongs and name in names:
            names.remove(name)


def probabilities(name: str, mean: Tensor, cov: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
    """Class probabilities of a Gaussian over contrasts.

    Args:
        name: how to integrate softmax over the Gaussian.
        mean: [..., N, C - 1] of f_c - f_0.
        cov: [..., N, C - 1, C - 1].
        n_samples: of the Monte-Carlo link.
        generator: of the Monte-Carlo link, on the CPU.

    Returns:
        [..., N, C], rows sum to one.
    """
    check_choice("link_approx", name, LINKS)
    with torch.autocast(mean.device.type, enabled=False):
        return _LINKS[name](mean.expand(cov.shape[:-1]), cov, n_samples, generator)


def _all_contrasts(mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """Adds the contrast f_0 - f_0 = 0: mean [..., C], cov [..., C, C]."""
    return torch.nn.functional.pad(mean, (1, 0)), torch.nn.functional.pad(cov, (1, 0, 1, 0))


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


link("probit", lambda mean, cov, *_: _probit(*_all_contrasts(mean, cov)))
link("mc", _monte_carlo, samples=True)
link("bridge", lambda mean, cov, *_: _laplace_bridge(*_all_contrasts(mean, cov)))
