"""What stands for your model and your data: tiny random models with LoRA, and texts of random words."""

import peft
import torch
import transformers

VOCABULARY, LENGTH = 64, 12
ANSWERS = [5, 11]  # the tokens of "no" and "yes"


def texts(n, seed, batch_size=16, real=False):
    """Batches of texts about the weather: words are cold (16 to 39) or warm (40 to 63), the label says which prevails.

    A tenth of the labels is wrong, as in life. With `real` they are numbers: the share of warm words, with noise.
    """
    generator = torch.Generator().manual_seed(seed)
    warmth = torch.rand(n, 1, generator=generator)
    words = torch.randint(16, 40, (n, LENGTH), generator=generator)
    words += 24 * (torch.rand(n, LENGTH, generator=generator) < warmth)
    warm = (words >= 40).float().mean(1)
    wrong = torch.rand(n, generator=generator) < 0.1
    labels = warm + 0.1 * torch.randn(n, generator=generator) if real else ((warm > 0.5) ^ wrong).long()
    data = {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels}
    return [
        {name: values[start : start + batch_size] for name, values in data.items()}
        for start in range(0, n, batch_size)
    ]


def causal_model(seed=0):
    """A language model of two layers with LoRA on its attention."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.2, **sizes)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)


def encoder(outputs=2, seed=0):
    """A text encoder of two layers with LoRA on its attention and a trained head."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, initializer_range=0.2, num_labels=outputs, **sizes
    )
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    return peft.get_peft_model(transformers.BertForSequenceClassification(config), lora)


def train(model, batches, logits=lambda output: output.logits, epochs=30):
    """Fine-tunes for too long: the model gets over-confident."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(epochs):
        for batch in batches:
            outputs, labels = logits(model(batch["input_ids"], batch["attention_mask"])), batch["labels"]
            loss = torch.nn.functional.cross_entropy if labels.dtype == torch.long else _squares
            optimiser.zero_grad()
            loss(outputs, labels).backward()
            optimiser.step()
    return model.eval()


def answer_logits(output):
    """The logits of the answers after a text."""
    return output.logits[:, -1, ANSWERS]


def _squares(outputs, labels):
    return torch.nn.functional.mse_loss(outputs[:, 0], labels)
