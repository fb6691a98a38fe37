"""transformers' Trainer: a callback fits, tunes and saves the posterior when training ends."""

import tempfile

import torch
import toy
import transformers

from laplace_lora_fast import Answers, LaplaceLoRA
from laplace_lora_fast.integrations.trainer import LaplaceCallback


def examples(n, seed):
    """As for fine-tuning: the answer follows the text, and is the only token with a label."""
    (batch,) = toy.texts(n, seed, batch_size=n)
    answers = torch.tensor(toy.ANSWERS)[batch["labels"]]
    words = torch.cat([batch["input_ids"], answers[:, None]], 1)
    labels = torch.full_like(words, -100)
    labels[:, -1] = answers
    return [{"input_ids": x, "labels": y} for x, y in zip(words, labels, strict=True)]


model, held_out = toy.causal_model(), examples(64, seed=1)
callback = LaplaceCallback(Answers(toy.ANSWERS), eval_data=held_out)  # its default is tuning="held_out"
with tempfile.TemporaryDirectory() as folder:
    args = transformers.TrainingArguments(
        folder, num_train_epochs=5, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True
    )
    trainer = transformers.Trainer(model, args, train_dataset=examples(128, seed=0), callbacks=[callback])
    trainer.train()
    print(callback.laplace)
    la = LaplaceLoRA.load(folder, model)  # adapter and posterior lie in the output folder
print(la.predict(toy.texts(3, seed=2)[0]))
