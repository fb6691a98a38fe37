"""LoRA layers as the rest sees them: their weights, what they compute, which of them were trained."""
