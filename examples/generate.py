"""Text with its uncertainty: fine-tune on answers, fit the posterior of every answer token, then ask and generate."""

import torch
import toy

from laplace_lora_fast import HeldOut, LaplaceLoRA, Tokens


def conversations(n, seed):
    """Texts about the weather, and what is said of it in three words; a tenth says the opposite.

    From texts and a tokenizer: `text_batches(tokenizer, [{"prompt": .., "completion": ..}, ..], 16)`.
    """
    found = []
    for batch in toy.texts(n, seed):
        cold, warm = torch.tensor([20, 17, 30]), torch.tensor([20, 45, 51])
        answers = torch.where(batch["labels"][:, None] == 1, warm, cold)
        ids = torch.cat([batch["input_ids"], answers], 1)
        labels = ids.clone()
        labels[:, : toy.LENGTH] = -100  # the prompt is not learnt, as in any fine-tuning
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def train_on(model, batches, epochs=15):
    """The usual fine-tuning: next-token loss on the answers' tokens."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in epochs * batches:
        optimiser.zero_grad()
        model(**batch).loss.backward()
        optimiser.step()
    return model.eval()


train, held_out = conversations(128, seed=0), conversations(64, seed=1)
model = train_on(toy.causal_model(), train)

la = LaplaceLoRA(model, Tokens(samples=4))  # a label at every token that has one
la.fit(train)  # one forward and four backward passes a batch
print("prior precision:", la.optimize_prior_precision(HeldOut(held_out, grid=[10, 100, 1e3, 1e4, 1e5])))

test = conversations(16, seed=2)[0]
uncertainty = la.token_uncertainty(test, n_samples=8)  # of every labelled token, given those before it
print("epistemic, nats:", uncertainty.epistemic[0, toy.LENGTH :])
print("of whole answers:", uncertainty.sequence().epistemic[:4])
mean, variance = la.sequence_log_prob(test)  # one backward pass, no samples
print("log p of the first answer:", float(mean[0]), "+-", float(variance[0]) ** 0.5)

prompts = {"input_ids": test["input_ids"][:2, : toy.LENGTH]}  # or texts, with a tokenizer
answers = la.generate(prompts, n_samples=8, max_new_tokens=3)
print(answers.tokens, answers.uncertainty.epistemic, answers.sequence().rmi, sep="\n")

samples = la.sample(8)  # what all of it is made of: any function of the model under each
logits = samples.apply(lambda: model(test["input_ids"]).logits[:, -1])
assert logits.shape == (8, 16, toy.VOCABULARY)
