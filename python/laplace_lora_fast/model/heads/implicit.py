"""The head of policies trained by direct preference optimisation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora_fast.devices import to_device
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError
from laplace_lora_fast.model.batches import Batch, Inputs
from laplace_lora_fast.model.heads.causal import OptionHead


class ImplicitRewardHead(OptionHead):
    """The implicit reward of direct preference optimisation, beta (log p(y | x) - log p_reference(y | x)).

    A batch has "option_mask" [S, T], true at the completion's tokens, "reference" [S], their log probability under the
    reference model, and "group".

    Args:
        model: the model.
        beta: of the training.
    """

    own_keys = ("option_mask", "reference")

    def __init__(self, model: nn.Module, beta: float) -> None:
        super().__init__(model, mean=False)
        self._beta = beta

    def inputs(self, batch: Batch, device: torch.device, checks: DeferredChecks) -> Inputs:
        inputs = super().inputs(batch, device, checks)
        reference = batch["reference"]
        if reference.shape != (inputs.n_sequences,) or not reference.is_floating_point():
            raise InvalidBatchError(
                f"'reference' must hold {inputs.n_sequences} log probabilities, got {tuple(reference.shape)} of "
                f"{reference.dtype}"
            )
        return replace(inputs, own=inputs.own | {"reference": to_device(reference, device)})

    def read(self, output: Any, inputs: Inputs) -> Tensor:
        scores = super().read(output, inputs)
        return self._beta * (scores - inputs.own["reference"][:, None].to(scores.dtype))
