"""TRL: a posterior of a reward model as a reward function of GRPO, RLOO and their kin. Imports nothing of TRL's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from laplace_lora_fast.data.preferences import preference_batches
from laplace_lora_fast.laplace import LaplaceLoRA
from laplace_lora_fast.tasks import Preference


class LaplaceReward:
    """mean - k sd of each completion's reward, for `GRPOTrainer(reward_funcs=LaplaceReward(la, tokenizer))`.

    The sd is that of the reward against the mean of its group, the completions of the same prompt, by their joint
    covariance: a shift that the group has in common is not known and changes no advantage. So a policy gains nothing
    from completions that the reward model knows little about (Coste et al. 2024, "Reward model ensembles help mitigate
    overoptimization", with the posterior in the place of an ensemble).

    Args:
        la: of a reward model, fitted with `Preference()`.
        tokenizer: of the reward model.
        k: how many standard deviations are taken off; 0 for the mean.
        max_length: of prompt and completion, in tokens; longer ones lose tokens on the left.

    Raises:
        ValueError: the posterior is of another task, or `k` is negative.
    """

    __name__ = "laplace_reward"  # what TRL logs it under

    def __init__(
        self, la: LaplaceLoRA, tokenizer: Any, k: float = 1.0, max_length: int | None = None
    ) -> None:
        if not isinstance(la.task, Preference):
            raise ValueError(f"LaplaceReward needs a posterior of Preference(), this one is of {la.task!r}")
        if not k >= 0:
            raise ValueError(f"k must be at least 0, got {k}")
        self._la, self._tokenizer, self._k, self._max_length = la, tokenizer, k, max_length

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """Rewards of completions, in their order.

        Args:
            prompts: of each completion, text or messages; those of one group are the same.
            completions: texts, or messages.
        """
        groups: dict[str, list[int]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(repr(prompt), []).append(place)
        found = [0.0] * len(completions)
        for places in groups.values():
            for place, reward in zip(places, self._of_group(prompts, completions, places), strict=True):
                found[place] = reward
        return found

    def _of_group(self, prompts: Sequence[Any], completions: Sequence[Any], places: list[int]) -> list[float]:
        some = [completions[place] for place in places]
        alone = len(some) == 1  # a group has two members at least: it stands there twice
        row = {"prompt": prompts[places[0]], "candidates": 2 * some if alone else some}
        (batch,) = preference_batches(
            self._tokenizer, [row], 1, max_length=self._max_length, truncate=self._max_length is not None
        )
        rewards = self._la.reward(batch)
        mean, cov = rewards.mean[0], rewards.covariance[0]
        if alone:
            return [float(mean[0] - self._k * cov[0, 0].clamp_min(0).sqrt())]
        centred = torch.eye(len(some), dtype=cov.dtype) - 1 / len(some)
        sd = (centred @ cov @ centred).diagonal().clamp_min(0).sqrt()
        bounds: list[float] = (mean - self._k * sd).tolist()
        return bounds
