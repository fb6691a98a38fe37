"""Generation: the cache against teacher forcing, decoding, prompts of any form."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from laplace_lora_fast import KFAC, Answers, InvalidBatchError, LaplaceLoRA, Tokens
from laplace_lora_fast.text.generation import Decoding
from tests import tiny, words
from tests.oracle import assert_close

PROMPTS = tiny.batch(3, length=6, labels=False, padding="left")


def mistral() -> nn.Module:
    """Attention in a window of four tokens, with norms in fp64."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MistralConfig(
        vocab_size=tiny.VOCAB, num_key_value_heads=2, sliding_window=4, initializer_range=0.3, **sizes
    )
    return tiny.adapt(transformers.MistralForCausalLM(config))


MODELS = {"llama": lambda: tiny.tiny_llama(targets=("q_proj", "v_proj", "lm_head")), "gpt2": tiny.tiny_gpt2}
MODELS["mistral"] = mistral


def fitted(model: nn.Module | None = None, **options: object) -> LaplaceLoRA:
    batch = tiny.batch(5, length=7, padding="right", labels=False)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    la = LaplaceLoRA(
        tiny.tiny_llama() if model is None else model, Tokens(samples=2), prior_precision=20.0, **options
    )  # type: ignore[arg-type]
    return la.fit([batch], progress=False)


def forced(la: LaplaceLoRA, prompt: Tensor, answer: Tensor, n: int) -> object:
    """Uncertainty of an answer by one pass over prompt and answer."""
    whole = torch.cat([prompt, answer])[None]
    labels = whole.clone()
    labels[:, : len(prompt)] = -100
    return la.token_uncertainty({"input_ids": whole, "labels": labels}, n_samples=n)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_cache_is_teacher_forcing(name: str, do_sample: bool) -> None:
    la = fitted(MODELS[name]())
    found = la.generate(PROMPTS, n_samples=3, max_new_tokens=5, do_sample=do_sample)
    for row, mask in enumerate(PROMPTS["attention_mask"].bool()):
        prompt = PROMPTS["input_ids"][row][mask]
        answer = found.tokens[row][found.mask[row]]
        expected = forced(la, prompt, answer, 3)
        own = slice(len(prompt), None)
        for measure in ("total", "aleatoric", "cross"):
            got = getattr(found.uncertainty, measure)[row, : len(answer)]
            assert_close(got, getattr(expected, measure)[0, own], 1e-6)
        got = found.uncertainty.log_probs[:, row, : len(answer)]
        assert_close(got, expected.log_probs[:, 0, own], 1e-6)
        if not do_sample:  # the mixture's likeliest token at each step
            samples = la.sample(3)
            ids = torch.cat([prompt, answer])[None]
            logits = samples.apply(lambda ids=ids: la.model(input_ids=ids).logits)[:, 0, len(prompt) - 1 : -1]
            assert torch.equal(logits.softmax(-1).mean(0).argmax(-1), answer)


def test_prompts_do_not_feel_each_other() -> None:
    la = fitted()
    together = la.generate(PROMPTS, n_samples=3, max_new_tokens=4)
    right = tiny.repad(PROMPTS, "right", 8)
    padded = la.generate(right, n_samples=3, max_new_tokens=4)
    assert torch.equal(padded.tokens, together.tokens)
    for row, mask in enumerate(PROMPTS["attention_mask"].bool()):
        alone = la.generate(
            {"input_ids": PROMPTS["input_ids"][row][mask][None]}, n_samples=3, max_new_tokens=4
        )
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert_close(alone.uncertainty.total[0], together.uncertainty.total[row], 1e-8)


def test_an_answer_ends_where_the_model_says() -> None:
    la = fitted()
    free = la.generate(PROMPTS, n_samples=3, max_new_tokens=6)
    end = int(free.tokens[0, 2])
    stopped = la.generate(PROMPTS, n_samples=3, max_new_tokens=6, eos_token_id=[end])
    for row in range(3):
        places = (free.tokens[row] == end).nonzero().flatten()
        length = int(places[0]) + 1 if len(places) else 6
        assert int(stopped.mask[row].sum()) == length
        assert torch.equal(stopped.tokens[row, :length], free.tokens[row, :length])
    assert torch.equal(stopped.uncertainty.total.isnan(), ~stopped.mask)
    la.model.get_base_model().generation_config.eos_token_id = end
    assert torch.equal(la.generate(PROMPTS, n_samples=3, max_new_tokens=6).mask, stopped.mask)


def test_drawn_tokens_follow_the_mixture() -> None:
    log_probs = torch.tensor([[0.1, 0.5, 0.15, 0.25]], dtype=torch.float64).log().expand(1000, -1)
    uniforms = (torch.arange(1000) + 0.5).double() / 1000

    def counts(**options: object) -> list[int]:
        how = {"max_new_tokens": 1, "do_sample": True, "temperature": None, "top_k": None, "top_p": None}
        decoding = Decoding(**how | options, eos_token_ids=(), seed=0)  # type: ignore[arg-type]
        return torch.bincount(decoding.next(log_probs, uniforms), minlength=4).tolist()

    assert counts() == [100, 500, 150, 250]
    assert counts(top_k=2) == [0, 667, 0, 333]
    assert counts(top_p=0.75) == [0, 667, 0, 333]
    assert counts(top_p=0.76) == [0, 556, 167, 277]
    squares = torch.tensor([0.01, 0.25, 0.0225, 0.0625])
    expected = 1000 * squares / squares.sum()
    assert torch.allclose(torch.tensor(counts(temperature=0.5)).float(), expected, atol=1)
    assert counts(do_sample=False) == [0, 1000, 0, 0]


def test_draws_are_seeded() -> None:
    la = fitted()
    options = {"n_samples": 2, "max_new_tokens": 6, "do_sample": True}
    one, again = (la.generate(PROMPTS, **options) for _ in range(2))
    assert torch.equal(one.tokens, again.tokens)
    assert not torch.equal(one.tokens, la.generate(PROMPTS, **options, seed=1).tokens)


def test_texts_chats_and_batches() -> None:
    tokenizer, la = words.tokenizer(), fitted()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}the"
    found = la.generate(["good film", "a dull plot"], tokenizer, n_samples=2, max_new_tokens=3)
    assert found.prompts == ["good film", "a dull plot"]
    alone = la.generate("a dull plot", tokenizer, n_samples=2, max_new_tokens=3)
    assert alone.texts == found.texts[1:]
    chat = la.generate([{"role": "user", "content": "good film"}], tokenizer, n_samples=2, max_new_tokens=3)
    assert chat.prompts == ["good film the"]
    batch = {"input_ids": torch.tensor([tokenizer("a dull plot")["input_ids"]])}
    assert la.generate(batch, tokenizer, n_samples=2, max_new_tokens=3).texts == alone.texts
    assert la.generate(batch, n_samples=2, max_new_tokens=3).texts is None


def test_how_it_looks() -> None:
    tokenizer, la = words.tokenizer(), fitted()
    found = la.generate("good film", tokenizer, n_samples=2, max_new_tokens=3)
    assert "".join(found.pieces[0]).strip()
    assert found.marked(lambda piece, value: piece) == ["".join(found.pieces[0])]
    page = found.html(measure="total")
    assert page.count("<span") == 3
    assert f"{found.uncertainty.total[0, 0]:.3f}" in page
    assert found._repr_html_() == found.html()
    assert "epistemic" in repr(found)
    with pytest.raises(ValueError, match="measure must be one of"):
        found.html(measure="fear")
    with pytest.raises(ValueError, match="pass a tokenizer"):
        la.generate({"input_ids": torch.tensor([[1, 2]])}, n_samples=2, max_new_tokens=2).html()


def test_other_tasks_and_structures_generate_too() -> None:
    la = LaplaceLoRA(tiny.tiny_llama(), Answers(tiny.ANSWERS), structure=KFAC(), prior_precision=20.0)
    la.fit([tiny.batch(4)], progress=False)
    assert la.generate(PROMPTS, n_samples=2, max_new_tokens=2).tokens.shape == (3, 2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": 0.5}, "no effect without do_sample"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be positive"),
        ({"do_sample": True, "top_p": 1.5}, "top_p must be at most 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"n_samples": 0}, "n_samples must be at least 1"),
        ({"max_new_tokens": 60}, "model's context of 64"),
        ({"prompts": "text"}, "pass a tokenizer"),
        ({"prompts": {**PROMPTS, "labels": PROMPTS["input_ids"]}}, "'labels', which generation does not use"),
        ({"prompts": {"input_ids": torch.zeros(1, 0, dtype=torch.long)}}, "at least one token"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, object], match: str) -> None:
    la = fitted()
    arguments = {"prompts": PROMPTS, "n_samples": 2, "max_new_tokens": 2} | options
    with pytest.raises(ValueError, match=match):
        la.generate(**arguments)  # type: ignore[arg-type]


def test_an_empty_prompt_is_refused() -> None:
    la, tokenizer = fitted(), words.tokenizer()
    for prompts, match in (([], "no prompts"), (["good", ""], "prompt 2 is empty"), ([3], "neither a text")):
        with pytest.raises(InvalidBatchError, match=match):
            la.generate(prompts, tokenizer, max_new_tokens=2)
