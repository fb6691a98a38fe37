"""Curvature kernels: tensors in, tensors out."""
