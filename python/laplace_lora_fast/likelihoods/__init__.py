"""Likelihoods: what the outputs say about the targets, and what a Gaussian over outputs says about an answer."""

from laplace_lora_fast.likelihoods.base import Likelihood
from laplace_lora_fast.likelihoods.bernoulli import Bernoulli
from laplace_lora_fast.likelihoods.categorical import Categorical
from laplace_lora_fast.likelihoods.fisher import Fisher, MonteCarlo
from laplace_lora_fast.likelihoods.gaussian import Gaussian
from laplace_lora_fast.likelihoods.plackett_luce import PlackettLuce
from laplace_lora_fast.likelihoods.tokens import SampledTokens
from laplace_lora_fast.options import kinds

__all__ = [
    "Bernoulli",
    "Categorical",
    "Fisher",
    "Gaussian",
    "Likelihood",
    "MonteCarlo",
    "PlackettLuce",
    "SampledTokens",
    "by_name",
]


def by_name(likelihood: str | Likelihood) -> Likelihood:
    """A likelihood by its name in laplace-torch, or itself. Raises ValueError for another name."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    names: dict[str, type[Likelihood]] = {kind.name: kind for kind in kinds(Likelihood) if not kind.sampled}
    if likelihood not in names:
        raise ValueError(f"likelihood must be one of {sorted(names)} or a Likelihood, got {likelihood!r}")
    found: Likelihood = names[likelihood]()
    return found
