"""Structures of the curvature. Importing this registers those of the package."""

from laplace_lora_fast.structures.base import Structure
from laplace_lora_fast.structures.blocks.structures import EKFAC, KFAC, Diagonal
from laplace_lora_fast.structures.low_rank.structures import LowRank
from laplace_lora_fast.structures.rows.structures import Rows

__all__ = ["EKFAC", "KFAC", "Diagonal", "LowRank", "Rows", "Structure"]
