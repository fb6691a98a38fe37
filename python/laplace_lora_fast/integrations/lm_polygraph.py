"""lm-polygraph: what the posterior says of generated answers, as a calculator of statistics and estimators.

    calculators = [*register_default_stat_calculators("Whitebox"), container("posterior/")]
    UEManager(data, model, [LaplaceVariance(), ..], BuilderEnvironmentStatCalculator(model), calculators, ..)()

The host builds the calculator by `load_stat_calculator`, on the model that it generates with, which is the PEFT model
of the posterior. In a configuration of its command the builder is this module, by its dotted name. Written for
lm-polygraph 0.7.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laplace_lora_fast.integrations.hosts import require
from laplace_lora_fast.laplace import LaplaceLoRA

require("lm-polygraph", ["0.7"])

from lm_polygraph.estimators.estimator import Estimator  # noqa: E402  which may not be there
from lm_polygraph.stat_calculators.stat_calculator import StatCalculator  # noqa: E402
from lm_polygraph.utils.factory_stat_calculator import StatCalculatorContainer  # noqa: E402

LOG_PROBS, VARIANCES = "laplace_log_probs", "laplace_variances"
MUTUAL_INFORMATION, TOTALS = "laplace_mutual_information", "laplace_totals"


class LaplaceCalculator(StatCalculator):
    """Log probability of each greedy answer, its variance, and the uncertainty at each of its tokens.

    Args:
        la: fitted with `Tokens()`, on the model that lm-polygraph generates with.
        n_samples: of the weights, for the uncertainty at tokens.
    """

    def __init__(self, la: LaplaceLoRA, n_samples: int = 16) -> None:
        super().__init__()
        self._la, self._n_samples = la, n_samples

    @staticmethod
    def meta_info() -> tuple[list[str], list[str]]:
        """The statistics that this gives, and those that it needs."""
        return [LOG_PROBS, VARIANCES, MUTUAL_INFORMATION, TOTALS], ["input_tokens", "greedy_tokens"]

    def __call__(
        self, dependencies: dict[str, Any], texts: list[str], model: Any, max_new_tokens: int = 100, **_: Any
    ) -> dict[str, Any]:
        """Of a batch of answers; an answer without a token has none of it."""
        pad = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
        found: dict[str, list[Any]] = {name: [] for name in self.meta_info()[0]}
        for prompt, answer in zip(dependencies["input_tokens"], dependencies["greedy_tokens"], strict=True):
            real = _unpadded(list(prompt), pad)
            batch = {
                "input_ids": torch.tensor([[*real, *answer]]),
                "labels": torch.tensor([[-100] * len(real) + list(answer)]),
            }
            mean, variance = self._la.sequence_log_prob(batch)
            tokens = self._la.token_uncertainty(batch, n_samples=self._n_samples)
            here = slice(len(real), len(real) + len(answer))
            found[LOG_PROBS].append(float(mean))
            found[VARIANCES].append(float(variance))
            found[MUTUAL_INFORMATION].append(tokens.epistemic[0, here].numpy())
            found[TOTALS].append(tokens.total[0, here].numpy())
        return dict(found)


def container(posterior: str | Path, n_samples: int = 16) -> StatCalculatorContainer:
    """What a `UEManager` is told of the calculator.

    Args:
        posterior: the folder that `LaplaceLoRA.save` wrote, of a fit with `Tokens()`.
        n_samples: of the weights, for the uncertainty at tokens.
    """
    stats, dependencies = LaplaceCalculator.meta_info()
    options = {"posterior": str(posterior), "n_samples": n_samples}
    return StatCalculatorContainer("LaplaceCalculator", stats, dependencies, None, __name__, options)


def load_stat_calculator(config: Mapping[str, Any], builder: Any) -> LaplaceCalculator:
    """Called by the host: the calculator of a configuration, on the host's own model.

    Args:
        config: "posterior", and "n_samples" unless it is 16.
        builder: the host's environment, whose `model.model` is the PEFT model.

    Raises:
        ValueError: the posterior is none of `Tokens()`, or of another model.
    """
    la = LaplaceLoRA.load(config["posterior"], builder.model.model)
    if not la.likelihood.sampled:
        raise ValueError(f"a posterior of {la.task!r} says nothing of generated answers: fit with Tokens()")
    return LaplaceCalculator(la, config.get("n_samples", 16))


class LaplaceVariance(Estimator):
    """Standard deviation of an answer's log probability over the posterior."""

    def __init__(self) -> None:
        super().__init__([VARIANCES], "sequence")

    def __str__(self) -> str:
        return "LaplaceVariance"

    def __call__(self, stats: dict[str, Any]) -> np.ndarray:
        """[N]."""
        deviations: np.ndarray = np.sqrt(np.array(stats[VARIANCES]))
        return deviations


class LaplaceMutualInformation(Estimator):
    """Mean over an answer's tokens of the mutual information between token and weights."""

    def __init__(self) -> None:
        super().__init__([MUTUAL_INFORMATION], "sequence")

    def __str__(self) -> str:
        return "LaplaceMutualInformation"

    def __call__(self, stats: dict[str, Any]) -> np.ndarray:
        """[N]."""
        return np.array([float(np.mean(values)) for values in stats[MUTUAL_INFORMATION]])


def _unpadded(tokens: list[int], pad: int | None) -> list[int]:
    """Without the pads that stand before a prompt; the last token stays whatever it is."""
    start = 0
    while pad is not None and start < len(tokens) - 1 and tokens[start] == pad:
        start += 1
    return tokens[start:]
