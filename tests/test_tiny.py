from __future__ import annotations

import pytest
import torch

from tests import tiny

MODELS = {
    "llama": tiny.tiny_llama,
    "llama classifier": lambda: tiny.tiny_llama_classifier(3),
    "gpt2": tiny.tiny_gpt2,
    "bert": lambda: tiny.tiny_bert_classifier(3),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_reproducible_and_their_adapters_matter(name):
    model, again, batch = MODELS[name](), MODELS[name](), tiny.batch(3, labels=False)
    with torch.no_grad():
        logits = model.eval()(**batch).logits
        torch.testing.assert_close(again.eval()(**batch).logits, logits, rtol=0, atol=0)
        with model.disable_adapter():
            assert (model(**batch).logits - logits).abs().max() > 1e-2
