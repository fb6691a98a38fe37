"""Uncertainty of tokens and of whole sequences under samples of a model (Malinin and Gales, ICLR 2021).

With p_s the distribution of a token under sample s of n, p the mixture of them all and y the token that stands there:

    total       H[p]                               entropy of the mixture
    aleatoric   mean_s H[p_s]                      expected entropy
    epistemic   H[p] - mean_s H[p_s]               mutual information
    epkl        mean_s,r KL(p_s | p_r)             expected pairwise divergence, over all n^2 pairs
    rmi         mean_s KL(p | p_s)                 reverse mutual information; epkl = epistemic + rmi

Samples are shared by the tokens of a sequence, so that log probabilities add up under each sample, and joint measures
exist beside sums over tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import laplace_kernels as lk


@dataclass(frozen=True)
class TokenUncertainty:
    """Uncertainty about every token, given those before it.

    All but the tokens is NaN where no token was scored.

    Attributes:
        tokens: [N, T].
        mask: [N, T], True where a token was scored.
        total: [N, T] entropy of the mixture of all samples, in nats.
        aleatoric: [N, T] expected entropy of a sample.
        cross: [N, T] expected cross entropy of the mixture and a sample.
        log_probs: [n, N, T] log probability of the token that stands there, under each sample.
    """

    tokens: Tensor
    mask: Tensor
    total: Tensor
    aleatoric: Tensor
    cross: Tensor
    log_probs: Tensor

    @property
    def epistemic(self) -> Tensor:
        """[N, T] mutual information of the token and the weights."""
        return self.total - self.aleatoric

    @property
    def epkl(self) -> Tensor:
        """[N, T] expected pairwise KL divergence of two samples; a sample and itself are a pair too."""
        return self.cross - self.aleatoric

    @property
    def rmi(self) -> Tensor:
        """[N, T] reverse mutual information."""
        return self.cross - self.total

    @property
    def nll(self) -> Tensor:
        """[N, T] -log of the mixture's probability of the token."""
        return math.log(len(self.log_probs)) - self.log_probs.logsumexp(0)

    def sequence(self, normalised: bool = True) -> SequenceUncertainty:
        """The measures of whole sequences.

        Args:
            normalised: per token: divided by the number of tokens scored.
        """
        counts = self.mask.sum(1)
        scale = torch.ones_like(self.total[:, 0])
        if normalised:
            scale /= counts.clamp_min(1)

        def over_tokens(values: Tensor) -> Tensor:
            return values.where(self.mask, 0).sum(-1)

        joint = over_tokens(self.log_probs)  # [n, N]
        spread = joint.var(0) if len(joint) > 1 else torch.full_like(joint[0], math.nan)
        measures = {
            "total": over_tokens(self.total),
            "aleatoric": over_tokens(self.aleatoric),
            "epkl": over_tokens(self.epkl),
            "rmi": over_tokens(self.rmi),
            "nll": over_tokens(self.nll),
            "joint_nll": math.log(len(joint)) - joint.logsumexp(0),
            "expected_nll": -joint.mean(0),
        }
        return SequenceUncertainty(
            **{name: value * scale for name, value in measures.items()},
            log_prob_variance=spread * scale.square(),
            length=counts,
        )


@dataclass(frozen=True)
class SequenceUncertainty:
    """Uncertainty about whole sequences, [N] each.

    Attributes:
        total: sum over tokens of the mixture's entropy.
        aleatoric: of the expected entropy.
        epkl: of the expected pairwise KL divergence.
        rmi: of the reverse mutual information.
        nll: -log probability of the sequence, each token's the mixture's: product of expectations.
        joint_nll: -log of the samples' mean probability of the sequence: expectation of products.
        expected_nll: the samples' mean of -log probability.
        log_prob_variance: its variance over the samples; NaN for one sample.
        length: tokens scored.
    """

    total: Tensor
    aleatoric: Tensor
    epkl: Tensor
    rmi: Tensor
    nll: Tensor
    joint_nll: Tensor
    expected_nll: Tensor
    log_prob_variance: Tensor
    length: Tensor

    @property
    def epistemic(self) -> Tensor:
        """Sum over tokens of the mutual information."""
        return self.total - self.aleatoric

    @property
    def token_rmi(self) -> Tensor:
        """Reverse mutual information of the tokens that stand there, not in expectation over tokens."""
        return self.expected_nll - self.nll

    @property
    def joint_rmi(self) -> Tensor:
        """The same of the sequence as one outcome."""
        return self.expected_nll - self.joint_nll


def measured(logits: Tensor, tokens: Tensor) -> Tensor:
    """Total, aleatoric, cross and each sample's log probability of the token, [3 + n, S, l].

    Args:
        logits: [n, S, l, V] of every sample.
        tokens: [S, l] that stand there.
    """
    log_probs = logits.log_softmax(-1, dtype=lk.accumulation_dtype(logits.dtype))
    mixture = log_probs.logsumexp(0) - math.log(len(logits))
    p = mixture.exp()
    total = -(p * mixture).sum(-1)
    cross = -(p * log_probs.mean(0)).sum(-1)
    own = log_probs.gather(-1, tokens.expand(len(logits), *tokens.shape)[..., None])[..., 0]
    aleatoric = -(log_probs.exp() * log_probs).sum(-1).mean(0)
    return torch.cat([torch.stack([total, aleatoric, cross]), own])


def placed(measures: Tensor, tokens: Tensor, mask: Tensor) -> TokenUncertainty:
    """Measures [3 + n, N, T] of `measured`, where the mask [N, T] says."""
    measures = measures.where(mask, math.nan)
    total, aleatoric, cross = measures[:3]
    return TokenUncertainty(tokens, mask, total, aleatoric, cross, measures[3:])
