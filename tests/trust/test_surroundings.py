"""What a user has around a model is not disturbed: hooks, gradients, modules that an output function uses."""

from __future__ import annotations

import torch
from torch import nn

from laplace_lora_fast import Answers, Outputs
from tests.matrix import models, modes, oracle

BATCH = models.padded(models.sequences(), "right")
LABELS = torch.arange(6) % 3


def test_hooks_see_what_they_saw_and_stay():
    model = modes.decoder()
    seen: list[tuple[str, int]] = []
    handles = []
    for name, module in model.named_modules():
        if name.endswith("q_proj"):
            handles.append(
                module.register_forward_hook(lambda m, a, o, n=name: seen.append((n, o.shape[-1])))
            )
    with torch.no_grad():
        plain = model(**BATCH).logits
    once = list(seen)
    models.fitted(model, Answers(models.ANSWERS), BATCH, LABELS).predict(BATCH)
    seen.clear()
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, plain)
    assert seen == once
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    assert hooks == len(handles)


def test_hooks_that_change_a_block_are_part_of_the_model():
    model = modes.decoder()
    block = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp"))
    block.register_forward_hook(lambda module, args, output: 0.5 * output.tanh())
    rows = models.rows_of(BATCH)
    expected = oracle.posterior(model, models.answers_of, rows, rows)
    found = models.fitted(model, Answers(models.ANSWERS), BATCH, LABELS).logit_distribution(BATCH)
    assert oracle.error(found[0], expected[0]) < oracle.FP64
    assert oracle.error(found[1], expected[1]) < oracle.FP64


class Head(nn.Module):
    """A head of the user's own, outside the model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(models.VOCAB, 3).double()

    def forward(self, output, batch):
        return self.linear(output.logits[:, 0].tanh())


def test_no_gradient_is_left_in_an_outside_head():
    model, head = modes.decoder(), Head()
    rows = models.rows_of(BATCH)
    expected = oracle.posterior(model, lambda m, row: head(m(**row), row)[0], rows, rows)
    kept = torch.ones_like(head.linear.bias)
    head.linear.bias.grad = kept
    found = models.fitted(model, Outputs(head), BATCH, LABELS).logit_distribution(BATCH)
    assert oracle.error(found[1], expected[1]) < oracle.FP64
    assert head.linear.weight.grad is None
    assert head.linear.bias.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert head.linear.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_gradient_is_left_in_inputs_embeds():
    model = modes.decoder()
    embedding = model.get_input_embeddings()
    embeds = embedding(BATCH["input_ids"]).detach().requires_grad_()
    batch = {"inputs_embeds": embeds, "attention_mask": BATCH["attention_mask"]}
    by_ids = models.fitted(model, Answers(models.ANSWERS), BATCH, LABELS).logit_distribution(BATCH)
    found = models.fitted(model, Answers(models.ANSWERS), batch, LABELS).logit_distribution(batch)
    assert embeds.grad is None
    assert embeds.requires_grad
    assert oracle.error(found[1], by_ids[1]) < oracle.FP64
