"""Any other model: a function says what the outputs are, a likelihood what they say about the labels."""

import torch
import toy

from laplace_lora_fast import LaplaceLoRA, Outputs
from laplace_lora_fast.likelihoods import Gaussian

train, test = toy.texts(64, seed=0), toy.texts(16, seed=1)[0]
model = toy.causal_model().eval()


def answers(output, batch):
    """Two logits an example, from anywhere in the output: here the mean over the text, pads left out."""
    mask = batch["attention_mask"][:, :, None]
    return (output.logits[:, :, toy.ANSWERS] * mask).sum(1) / mask.sum(1)


la = LaplaceLoRA(model, Outputs(answers)).fit(train)  # softmax over the outputs
print(la.predict(test)[:3])

difference = Outputs(lambda output, batch: answers(output, batch).diff(dim=1), Gaussian(noise=0.5))
la = LaplaceLoRA(model, difference).fit([batch | {"labels": batch["labels"].float()} for batch in train])
assert torch.equal(la.predict(test), answers(model(test["input_ids"]), test).diff(dim=1).detach())
