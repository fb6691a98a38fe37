"""TRL's SFTTrainer is a Trainer: the same callback. Its token-level labels become class indices by themselves."""

import sys
import tempfile

import tokenizers
import toy
import transformers

try:
    import datasets
    import trl
except ImportError:
    sys.exit(print("needs TRL: pip install trl"))

from laplace_lora_fast import Answers
from laplace_lora_fast.integrations.trainer import LaplaceCallback

WORDS = {"<pad>": 0, "<end>": 1, **{f"w{number}": number for number in range(2, toy.VOCABULARY)}}


def examples(n, seed):
    """Prompts and completions, as TRL takes them."""
    (batch,) = toy.texts(n, seed, batch_size=n)
    pairs = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    rows = [
        {"prompt": " ".join(f"w{word}" for word in words), "completion": f" w{toy.ANSWERS[label]}"}
        for words, label in pairs
    ]
    return datasets.Dataset.from_list(rows)


core = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS))
core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
callback = LaplaceCallback(Answers(toy.ANSWERS))  # held out: the Trainer's evaluation set
with tempfile.TemporaryDirectory() as folder:
    args = trl.SFTConfig(
        folder, num_train_epochs=5, learning_rate=1e-2, eval_strategy="epoch", bf16=False, use_cpu=True
    )
    trainer = trl.SFTTrainer(
        toy.causal_model(),
        args,
        train_dataset=examples(128, seed=0),
        eval_dataset=examples(64, seed=1),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
print(callback.laplace)
print(callback.laplace.predict(toy.texts(3, seed=2)[0]))
