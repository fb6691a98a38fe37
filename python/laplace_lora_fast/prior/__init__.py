"""The prior of the LoRA weights, and ways of choosing its precision."""
