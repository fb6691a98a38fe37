"""The demonstration: a real language model, over-trained on few real examples, and what Laplace-LoRA makes of it."""
