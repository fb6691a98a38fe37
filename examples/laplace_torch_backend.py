"""laplace-torch stays as it is and changes its backend: correct under padding and checkpointing, and faster."""

import sys

import torch
import toy

try:
    from laplace import Laplace
except ImportError:
    sys.exit(print("needs laplace-torch: pip install --no-deps -r bench/requirements-peers.txt"))

from laplace_lora_fast.integrations.laplace_torch import FastGGN


class Answers(torch.nn.Module):
    """`model(batch)` gives logits [N, C], as everywhere in laplace-torch."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return toy.answer_logits(self.model(batch["input_ids"], batch["attention_mask"]))


batches = toy.texts(64, seed=0)
model = Answers(toy.causal_model().eval())  # its trainable parameters are the LoRA weights
examples = [{name: values[i] for name, values in batch.items()} for batch in batches for i in range(16)]
loader = torch.utils.data.DataLoader(examples, batch_size=16)

kron = Laplace(model, "classification", subset_of_weights="all", hessian_structure="kron", backend=FastGGN)
lowrank = Laplace(model, "classification", subset_of_weights="all", hessian_structure="lowrank_kron")
for la in (kron, lowrank):  # the second forms no dense Jacobian
    la.fit(loader, progress_bar=False)
    la.optimize_prior_precision()
    print(type(la).__name__, la.prior_precision, la(batches[0])[:2].tolist())
