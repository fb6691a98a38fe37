"""From rows on disk to batches."""

from laplace_lora_fast.data.groups import option_batches, option_batches_from_ids, preference_batches

__all__ = ["option_batches", "option_batches_from_ids", "preference_batches"]
