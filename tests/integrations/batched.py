"""Models that laplace-torch can call: one argument, the batch; one result, logits [N, C]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests import tiny

# Curvlinops takes forward-mode derivatives, which fused attention does not have. NaN where a row is all pads.
EAGER = {"attn_implementation": "eager"}


class Batched(nn.Module):
    """A transformer with logits [N, C]: of its classification head, or of the answers at the last real position."""

    def __init__(self, model: nn.Module, answers: bool = False) -> None:
        super().__init__()
        self.model, self.answers = model, answers
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("lora_" in name)

    def forward(self, batch: tiny.Batch) -> Tensor:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        out = self.model(
            input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
        if not self.answers:
            return out
        last = mask.cumsum(1).argmax(1)
        return out[torch.arange(len(out)), last][:, list(tiny.ANSWERS)]


def decoder(config: dict[str, object] | None = None, **options: object) -> Batched:
    return Batched(tiny.tiny_llama(config=config, **options), answers=True)


def network(outputs: int = 3) -> nn.Module:
    """Linear layers with and without bias, no LoRA."""
    torch.manual_seed(3)
    layers = nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, outputs)
    return nn.Sequential(*layers).double()


class Examples(torch.utils.data.Dataset):
    """The rows of a batch; a loader over them stacks them again."""

    def __init__(self, batch: tiny.Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, index: int) -> tiny.Batch:
        return {key: value[index] for key, value in self.batch.items()}


def loader(batch: tiny.Batch, size: int) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Examples(batch), batch_size=size)
