"""The functions of bayesian-lora 0.0.6: the same signatures and structures, so a script changes its import line only.

    from laplace_lora_fast.integrations.bayesian_lora import (
        calculate_kronecker_factors, cholesky_decompose_small_factors, model_evidence, jacobian_mean, variance,
    )

The default is the mathematics of Laplace-LoRA; `compat=True` gives bayesian-lora's numbers. What differs:

- Factors. Here S (x) A is the KFAC approximation of the generalised Gauss-Newton: every real token counts, the Fisher
  is exact (sampled beyond 32 logits), A is a mean and S a sum over the data. bayesian-lora sees the last token of each
  layer only and draws one label per example; its curvature is that of one average example, N times too small, except
  that its low-rank factors are not averaged over batches.
- Roots of small factors. Here exact, also for a singular factor; bayesian-lora adds 1e-8 to its diagonal.
- Evidence. Here log p(D) = LL - ||theta||^2 / (2 s2) - 1/2 sum_layers logdet M. bayesian-lora adds the norm (not
  squared) and the log determinants instead of subtracting them, and counts log s2 once for all layers.
- Logits of `jacobian_mean`. Here at the last real position of each example; bayesian-lora takes the last column, a pad
  under right padding.

In both modes the model is in evaluation mode (bayesian-lora fits with dropout on) and left as it was, gradient
checkpointing counts nothing twice, and a batch of one example is no error.
"""

from laplace_lora_fast.integrations.bayesian_lora.factors import (
    calculate_kronecker_factors,
    cholesky_decompose_small_factors,
    incremental_svd,
    stable_cholesky,
)
from laplace_lora_fast.integrations.bayesian_lora.posterior import jacobian_mean, model_evidence, variance

__all__ = [
    "calculate_kronecker_factors",
    "cholesky_decompose_small_factors",
    "incremental_svd",
    "jacobian_mean",
    "model_evidence",
    "stable_cholesky",
    "variance",
]
