"""From rows on disk to batches."""

from laplace_lora_fast.data.groups import option_batches, option_batches_from_ids
from laplace_lora_fast.data.preferences import (
    add_reference,
    direct_preference_batches,
    preference_batches,
    preference_batches_from_ids,
)
from laplace_lora_fast.data.texts import text_batches, text_batches_from_ids

__all__ = [
    "add_reference",
    "direct_preference_batches",
    "option_batches",
    "option_batches_from_ids",
    "preference_batches",
    "preference_batches_from_ids",
    "text_batches",
    "text_batches_from_ids",
]
