"""TRL's SFTTrainer is a Trainer: the same callback. Its token-level labels become class indices by themselves."""

import sys
import tempfile

import tokenizers
import toy
import torch
import transformers

try:
    import datasets
    import trl
except ImportError:
    sys.exit(print("needs TRL: pip install trl"))

from laplace_lora_fast import Answers
from laplace_lora_fast.integrations.trainer import LaplaceCallback


def examples(n, seed):
    """Tokenised already: the answer follows the text, and `completion_mask` says that it alone is learnt."""
    (batch,) = toy.texts(n, seed, batch_size=n)
    answers = torch.tensor(toy.ANSWERS)[batch["labels"]]
    words = torch.cat([batch["input_ids"], answers[:, None]], 1).tolist()
    mask = [[0] * toy.LENGTH + [1]] * n
    return datasets.Dataset.from_dict({"input_ids": words, "completion_mask": mask})


words = {f"w{number}": number for number in range(toy.VOCABULARY)}  # the Trainer wants a tokenizer for its pads
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words)), pad_token="w0", eos_token="w1"
)
callback = LaplaceCallback(Answers(toy.ANSWERS), eval_data=examples(64, seed=1))
with tempfile.TemporaryDirectory() as folder:
    args = trl.SFTConfig(
        folder, num_train_epochs=5, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, bf16=False
    )
    train = examples(128, seed=0)
    model = toy.causal_model()
    trl.SFTTrainer(model, args, train_dataset=train, processing_class=tokenizer, callbacks=[callback]).train()
print(callback.laplace)
print(callback.laplace.predict(toy.texts(3, seed=2)[0]))
