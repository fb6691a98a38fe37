"""A reward function for TRL's GRPOTrainer that takes off what the reward model does not know."""

import tokenizers
import torch
import toy
import transformers

from laplace_lora_fast import HeldOut, LaplaceLoRA, Preference
from laplace_lora_fast.data import preference_batches
from laplace_lora_fast.integrations.trl import LaplaceReward

WORDS = {"<pad>": 0, "<end>": 1, **{f"w{number}": number for number in range(2, toy.VOCABULARY)}}
core = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<pad>"))
core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")


def text(words):
    return " ".join(f"w{word}" for word in words.tolist())


def pairs(n, seed):
    """The warmer of two texts is chosen."""
    rows = []
    for batch in toy.texts(2 * n, seed, batch_size=2):
        cold, warm = sorted(batch["input_ids"], key=lambda words: int((words >= 40).sum()))
        rows.append({"prompt": "w2 w3", "chosen": f" {text(warm)}", "rejected": f" {text(cold)}"})
    return preference_batches(tokenizer, rows, 16)


train, model = pairs(64, seed=0), toy.encoder(outputs=1)
optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for batch in 10 * train:  # as TRL's RewardTrainer does
    rewards = model(batch["input_ids"], batch["attention_mask"]).logits.view(-1, 2)
    optimiser.zero_grad()
    torch.nn.functional.cross_entropy(rewards, batch["labels"]).backward()
    optimiser.step()

la = LaplaceLoRA(model.eval(), Preference()).fit(train)
la.optimize_prior_precision(HeldOut(pairs(32, seed=1)))

reward = LaplaceReward(la, tokenizer, k=1.0)  # GRPOTrainer(..., reward_funcs=reward)
completions = [f" {text(batch['input_ids'][0])}" for batch in toy.texts(4, seed=2, batch_size=1)]
print("mean - sd", reward(prompts=["w2 w3"] * 4, completions=completions))
print("mean     ", LaplaceReward(la, tokenizer, k=0.0)(prompts=["w2 w3"] * 4, completions=completions))
