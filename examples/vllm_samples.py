"""Adapters that vLLM serves: samples of the posterior, drawn where the model is still the linear one."""

import sys
import tempfile

import toy

from laplace_lora_fast import Answers, LaplaceLoRA

train, test = toy.texts(64, seed=0), toy.texts(16, seed=1)
model = toy.train(toy.causal_model(), train, toy.answer_logits)
la = LaplaceLoRA(model, Answers(toy.ANSWERS)).fit(train)

with tempfile.TemporaryDirectory() as folder:
    samples = la.sample_adapters(folder, n=4, prior_precision=100.0, check=test)  # prints how linear each is
    assert samples.lengths.ratio <= 1
    try:
        from laplace_lora_fast.integrations.vllm import register
    except ImportError as error:
        sys.exit(print(error))
    register(folder)  # in the server's process: a request with model="sample-002" is answered by that sample
