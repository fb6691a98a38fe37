"""A protocol made so small that it runs in seconds: a tiny random model, the rows beside this file, a few steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from bench.protocols.config import Protocol
from bench.protocols.records import questions, text_of

ROWS = Path(__file__).parent / "rows"


def smaller(protocol: Protocol) -> Protocol:
    """Two seeds, six steps, a checkpoint every two, few samples; everything else as published."""
    train = replace(protocol.train, steps=6, checkpoints=2, learning_rate=1e-2)
    methods = replace(protocol.methods, dropout_samples=2, members=2, link_samples=200)
    return replace(protocol, seeds=protocol.seeds[:2], train=train, methods=methods)


def model(protocol: Protocol) -> tuple[Any, Any]:
    """A random decoder with a tokenizer of the rows' words."""
    words = dict.fromkeys(["[UNK]", "[END]", "Answer:", *protocol.prompt.answers])
    for source in (protocol.train_set, *protocol.test_sets):
        for question in questions(source, str(ROWS), protocol.prompt):
            words |= dict.fromkeys(text_of(question, protocol.prompt, source.prompt).split())
    vocabulary = {word: place for place, word in enumerate(words)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", eos_token="[END]"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        max_position_embeddings=protocol.prompt.max_length,
        initializer_range=0.3,
        **sizes,
    )
    return transformers.LlamaForCausalLM(config).eval(), tokenizer
