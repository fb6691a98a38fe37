"""Which of several texts a language model finds likeliest behind a prompt: each prompt has options of its own."""

import torch
import toy

from laplace_lora_fast import HeldOut, LaplaceLoRA, Options
from laplace_lora_fast.data import option_batches_from_ids


def questions(n, seed):
    """(prompt, options, which is right): two to four options, one fits the weather, in a word or two.

    From texts and a tokenizer: `option_batches(tokenizer, [{"prompt": .., "choices": [..], "label": ..}, ..], 16)`.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for text in toy.texts(n, seed, batch_size=n)[0]["input_ids"]:
        warm = int((text >= 40).float().mean() > 0.5)
        sizes = torch.randint(1, 3, (int(torch.randint(2, 5, (), generator=generator)),), generator=generator)
        label = int(torch.randint(len(sizes), (), generator=generator))
        warmths = [warm if i == label else 1 - warm for i in range(len(sizes))]
        options = [[16 + i + 24 * warmths[i]] * int(size) for i, size in enumerate(sizes)]
        wrong = torch.rand((), generator=generator) < 0.1
        found.append((text.tolist(), options, (label + 1) % len(options) if wrong else label))
    return option_batches_from_ids(found, batch_size=16)


def train_on(model, batches, epochs=15):
    """The usual fine-tuning: next-token loss on the right option's tokens."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in epochs * batches:
        first = torch.cat([torch.tensor([0]), batch["group"].bincount().cumsum(0)[:-1]])
        right = first + batch["labels"]
        ids, scored = batch["input_ids"][right], batch["option_mask"][right]
        optimiser.zero_grad()
        model(ids, batch["attention_mask"][right], labels=ids.where(scored, -100)).loss.backward()
        optimiser.step()
    return model.eval()


train, held_out, test = questions(256, seed=0), questions(64, seed=1), questions(128, seed=2)
model = train_on(toy.causal_model(), train)

la = LaplaceLoRA(model, Options()).fit(train)  # score="mean" weighs long and short options alike
la.optimize_prior_precision(HeldOut(held_out))
print(la.predict(test[0])[:3])  # [N, most options]: zeros behind the last option of an example

plain, laplace = (la.predictions(test, link_approx=link).metrics() for link in ("map", "probit"))
print(f"NLL {plain.nll:.3f} -> {laplace.nll:.3f}, calibration error {plain.ece:.3f} -> {laplace.ece:.3f}")
assert laplace.nll < plain.nll
