"""Other ways to class probabilities, behind one interface: what the posterior is compared with."""

from laplace_lora_fast.baselines.base import Baseline, Case
from laplace_lora_fast.baselines.by_backprop import BLoB
from laplace_lora_fast.baselines.ensembles import Ensemble, MCDropout
from laplace_lora_fast.baselines.laplace import Laplace
from laplace_lora_fast.baselines.point import MAP, CrossFittedTemperature, Temperature
from laplace_lora_fast.baselines.training_free import TrainingFree

__all__ = [
    "MAP",
    "BLoB",
    "Baseline",
    "Case",
    "CrossFittedTemperature",
    "Ensemble",
    "Laplace",
    "MCDropout",
    "Temperature",
    "TrainingFree",
]
