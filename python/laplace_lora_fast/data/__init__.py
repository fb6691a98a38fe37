"""From rows on disk to batches."""
