"""laplace-torch 0.3: curvature backends, `hessian_structure="lowrank_kron"`, and conversion of fitted posteriors.

    from laplace import Laplace
    from laplace_lora_fast.integrations.laplace_torch import FastGGN

    la = Laplace(model, "classification", subset_of_weights="all", hessian_structure="kron", backend=FastGGN)

As everywhere in laplace-torch, `model(batch)` gives logits [N, C] and every parameter that requires grad takes part;
here these must be weights and biases of linear layers, as lora_A and lora_B are. Importing this package also registers
`LowRankKronLaplace` for `Laplace(model, "classification", "all", "lowrank_kron")`.

What differs from laplace-torch's own backends:

- Tokens that the batch's `attention_mask` masks count nowhere. Without padding the factors are curvlinops'. With it,
  they are what curvlinops gives for the same examples alone and unpadded: kfac_approx="expand" averages the inputs of
  each example over its own real tokens.
- Gradient checkpointing counts no input twice (curvlinops: once more with every backward pass).
- The sampled Fisher draws other labels for every batch.
- The empirical Fisher of a regression is that of the Gaussian likelihood. laplace-torch's is twice as large: it halves
  the squared gradients of a loss that is itself twice the negative log-likelihood.
"""

from laplace_lora_fast.integrations.laplace_torch.convert import from_state_dict, to_kron, to_state_dict
from laplace_lora_fast.integrations.laplace_torch.curvature import FastEF, FastGGN
from laplace_lora_fast.integrations.laplace_torch.lowrank import LowRankKron, LowRankKronLaplace

__all__ = [
    "FastEF",
    "FastGGN",
    "LowRankKron",
    "LowRankKronLaplace",
    "from_state_dict",
    "to_kron",
    "to_state_dict",
]
