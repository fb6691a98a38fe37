"""Laplace-LoRA: Kronecker-factored Laplace posteriors over LoRA weights."""
