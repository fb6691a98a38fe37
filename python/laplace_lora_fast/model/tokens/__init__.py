"""Logits at many positions of a sequence: chunk by chunk, and scores made of them."""
