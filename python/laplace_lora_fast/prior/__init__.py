"""The prior of the LoRA weights, and ways of choosing its precision. Importing this registers those of the package."""

from laplace_lora_fast.prior.cross_fit import CrossFit
from laplace_lora_fast.prior.evidence import Evidence
from laplace_lora_fast.prior.held_out import HeldOut
from laplace_lora_fast.prior.leave_one_out import LeaveOneOut

__all__ = ["CrossFit", "Evidence", "HeldOut", "LeaveOneOut"]
