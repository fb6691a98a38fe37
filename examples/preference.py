"""A reward model from preferences: how sure it is which answer is better, and best-of-n with that in mind."""

import torch
import toy

from laplace_lora_fast import HeldOut, LaplaceLoRA, Preference


def pairs(n, seed, size=2):
    """Batches of groups of texts; the warmest is preferred, but for a tenth. From TRL's rows: `preference_batches`."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for texts in toy.texts(size * n, seed, batch_size=16 * size):
        words = texts["input_ids"]
        group = torch.arange(len(words) // size).repeat_interleave(size)
        labels = (words >= 40).sum(1).view(-1, size).argmax(1)
        wrong = torch.rand(len(labels), generator=generator) < 0.1
        labels = labels.where(~wrong, (labels + 1) % size)
        mask = torch.ones_like(words)
        batches.append({"input_ids": words, "attention_mask": mask, "group": group, "labels": labels})
    return batches


train, held_out = pairs(256, seed=0), pairs(64, seed=1)
model = toy.encoder(outputs=1)  # one output: the reward
optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for batch in 15 * train:  # as TRL's RewardTrainer does: softmax over the rewards of a pair
    rewards = model(batch["input_ids"], batch["attention_mask"]).logits.view(-1, 2)
    optimiser.zero_grad()
    torch.nn.functional.cross_entropy(rewards, batch["labels"]).backward()
    optimiser.step()

la = LaplaceLoRA(model.eval(), Preference()).fit(train)
la.optimize_prior_precision(HeldOut(held_out))
plain, laplace = (la.predictions(held_out, link_approx=link).metrics() for link in ("map", "probit"))
print(f"NLL of which is preferred {plain.nll:.3f} -> {laplace.nll:.3f}")
assert laplace.nll < plain.nll

candidates = pairs(4, seed=3, size=5)[0]  # five answers to each of four prompts
rewards = la.reward(candidates)
print("rewards", rewards.mean[0], "give or take", rewards.sd[0])
print("each is the best with probability", rewards.best_probability()[0])
print("best of five", rewards.best(), "and with caution", rewards.best(k=1.0))
