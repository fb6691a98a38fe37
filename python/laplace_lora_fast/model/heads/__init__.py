"""What turns a batch into u: heads of classifiers, rewards, choices and functions; causal.py has language models."""

from laplace_lora_fast.model.heads.base import (
    ChoiceHead,
    ClassHead,
    Head,
    OutputFn,
    OutputHead,
    RewardHead,
    context_length,
    innermost,
)

__all__ = [
    "ChoiceHead",
    "ClassHead",
    "Head",
    "OutputFn",
    "OutputHead",
    "RewardHead",
    "context_length",
    "innermost",
]
