"""lm-polygraph: statistics of generated answers from the posterior, and estimators that use them."""

import sys

import torch
import toy

from laplace_lora_fast import LaplaceLoRA, Tokens

try:
    from laplace_lora_fast.integrations.lm_polygraph import LaplaceCalculator, LaplaceVariance
except ImportError as error:
    sys.exit(print(error))

texts = [{"input_ids": b["input_ids"], "labels": b["input_ids"]} for b in toy.texts(32, seed=0)]
la = LaplaceLoRA(toy.causal_model().eval(), Tokens(samples=2)).fit(texts)
calculator = LaplaceCalculator(
    la, n_samples=4
)  # among a UEManager's calculators, behind that of greedy_tokens
tokens = torch.arange(16, 24).view(2, 4).tolist()
stats = {"input_tokens": tokens, "greedy_tokens": [[41, 42], [43, 44, 45]]}
stats |= calculator(stats, ["first", "second"], model=None)
print(LaplaceVariance()(stats))
