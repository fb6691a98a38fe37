"""Curvature as independent blocks: KFAC, EKFAC and the diagonal."""
