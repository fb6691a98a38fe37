from __future__ import annotations

import pytest
import torch
import transformers

from laplace_lora_fast import KFAC, Answers, Classes, LaplaceLoRA, Outputs
from tests import tiny
from tests.model.taps import ANSWERS, read, tapped


def logits_of(model, batch, task):
    """Logits as a tap without observer gives them."""
    tap, head = tapped(model, task, None)
    with tap:
        return tap.forward(read(head, batch))


MASKS = {
    "left": [[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]],
    "right": [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "both": [[0, 1, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 1]],
}
LAST = {"left": [3, 3, 3], "right": [1, 0, 3], "both": [2, 1, 3], "holes": [2, 3, 3]}
POSITIONS = {
    "left": [[0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3]],
    "right": [[0, 1, 1, 1], [0, 0, 0, 0], [0, 1, 2, 3]],
    "both": [[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 2, 3]],
    "holes": [[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1]],
}


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, dtype):
    mask = torch.tensor(MASKS[name])
    batch = {"input_ids": torch.full((3, 4), 9), "attention_mask": mask.to(dtype)}
    inputs = read(ANSWERS.head(tiny.tiny_llama()), batch)
    assert torch.equal(inputs.mask, mask.bool())
    assert inputs.last.tolist() == LAST[name]
    assert inputs.positions.tolist() == POSITIONS[name]
    assert torch.equal(inputs.model["attention_mask"], batch["attention_mask"])
    assert (inputs.n_sequences, inputs.length, inputs.labels) == (3, 4, None)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 3)])
def test_batches_without_padding_carry_no_mask(mask):
    batch = {"input_ids": torch.full((2, 3), 9)} | ({} if mask is None else {"attention_mask": mask})
    inputs = read(ANSWERS.head(tiny.tiny_llama()), batch)
    assert inputs.mask is None
    assert inputs.last.tolist() == [2, 2]
    assert inputs.positions is None


def test_what_the_model_is_given():
    batch = {**tiny.batch(3), "extra": "kept"}
    before = dict(batch)
    model = tiny.tiny_llama()
    head = ANSWERS.head(model)
    inputs = head.placed(model, read(head, batch))
    assert inputs.model.keys() == {"input_ids", "attention_mask", "position_ids", "extra", "use_cache"}
    assert torch.equal(inputs.model["position_ids"], (batch["attention_mask"].cumsum(1) - 1).clamp(min=0))
    assert inputs.model["use_cache"] is False
    assert torch.equal(inputs.labels, batch["labels"])
    assert batch == before
    mine = torch.arange(7).expand(3, 7) + 2
    given = {**tiny.batch(3), "position_ids": mine}
    assert torch.equal(head.placed(model, read(head, given)).model["position_ids"], mine)
    for other in ({"images": torch.zeros(3, 2)}, {"position_ids": mine}):
        assert read(head, {**batch, **other}).positions is None
    assert read(Classes().head(tiny.tiny_llama_classifier(2)), tiny.batch(3)).positions is None


def test_a_batch_of_the_callers_graph_is_left_alone():
    model, batch = tiny.tiny_llama_classifier(2), tiny.batch(3, classes=2, padding=None)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    given = {"inputs_embeds": embeds, "labels": batch["labels"]}
    la = LaplaceLoRA(model, Classes()).fit([given], progress=False)
    torch.testing.assert_close(la.predict(given), la.predict(batch), rtol=1e-12, atol=1e-12)
    assert embeds.grad is None


def expected_logits(model, batch, ids):
    """One example at a time, without its pads."""
    rows = []
    with torch.no_grad():
        for tokens, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            rows.append(model.eval()(input_ids=tokens[mask.bool()][None]).logits[0, -1, list(ids)])
    return torch.stack(rows)


SMALL = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def tiny_causal_roberta():
    """Its positions start behind the pad token's id, and it finds the pads in the tokens."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**SMALL, pad_token_id=0, is_decoder=True)
    return tiny.adapt(transformers.RobertaForCausalLM(config), targets=("query", "value"))


def tiny_causal_bert():
    """Absolute positions that know nothing of pads."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, is_decoder=True)
    return tiny.adapt(transformers.BertLMHeadModel(config), targets=("query", "value"))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("build", [tiny.tiny_llama, tiny.tiny_gpt2, tiny_causal_roberta, tiny_causal_bert])
def test_answers_are_read_at_the_last_real_position_in_their_order(build, padding):
    model, batch = build(), tiny.batch(4, padding=padding)
    for ids in (tiny.ANSWERS, tiny.ANSWERS[::-1], (40, 3)):
        expected = expected_logits(model, batch, ids)
        for given in (ids, list(ids), torch.tensor(ids)):
            got = logits_of(model, batch, Answers(given))
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_answers_in_another_order_are_the_same_classes_renamed():
    model, train, test = tiny.tiny_llama(targets=("q_proj", "lm_head")), tiny.batch(6), tiny.batch(3, seed=1)
    order = [2, 0, 1]
    renamed = {**train, "labels": torch.tensor([order.index(label) for label in train["labels"].tolist()])}
    one, other = (
        LaplaceLoRA(model, Answers(ids), structure=KFAC()).fit([data], progress=False)
        for ids, data in ((tiny.ANSWERS, train), ([tiny.ANSWERS[i] for i in order], renamed))
    )
    torch.testing.assert_close(
        other.log_marginal_likelihood(), one.log_marginal_likelihood(), rtol=1e-10, atol=1e-10
    )
    mean, cov = one.logit_distribution(test)
    got_mean, got_cov = other.logit_distribution(test)
    torch.testing.assert_close(got_mean, mean[:, order], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got_cov, cov[:, order][:, :, order], rtol=1e-9, atol=1e-9)
    for link in ("probit", "bridge", "map"):
        expected = one.predict(test, link_approx=link)[:, order]
        torch.testing.assert_close(other.predict(test, link_approx=link), expected, rtol=1e-9, atol=1e-9)


def test_language_model_head_runs_on_one_position_inside_and_on_all_outside():
    model, batch = tiny.tiny_llama(), tiny.batch(3)
    seen = []
    lm_head = model.get_base_model().lm_head
    lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    la = LaplaceLoRA(model, ANSWERS).fit([batch], progress=False)
    la.predict(batch)
    la.predict(batch, link_approx="map")
    alone = [(1, 7, tiny.VOCAB)] * 2  # finds out, once, where positions start
    first = [(3, 1, tiny.VOCAB)] * 2 + [
        (1, 1, tiny.VOCAB)
    ] * 4  # one sequence alone; again, a step ahead and behind
    assert seen == alone + first + [(3, 1, tiny.VOCAB)] * 2
    seen.clear()
    model(**{k: v for k, v in batch.items() if k != "labels"})
    assert seen == [(3, 7, tiny.VOCAB)]


def test_functions_of_outputs_see_output_and_batch():
    model, seen = tiny.tiny_llama(), []
    batch = {**tiny.batch(3), "position_ids": torch.arange(7).expand(3, 7)}

    def last_two(output, given):
        seen.append(given)
        last = given["attention_mask"].shape[1] - 1
        return output.logits[:, last, [4, 9]]

    got = logits_of(model, batch, Outputs(last_two))
    with torch.no_grad():
        expected = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, -1, [4, 9]]
    torch.testing.assert_close(got, expected)
    assert torch.equal(seen[0]["input_ids"], batch["input_ids"])


def test_classifier_logits_are_the_models_own():
    for model in (tiny.tiny_llama_classifier(3), tiny.tiny_bert_classifier(2)):
        batch = tiny.batch(3, padding="right", labels=False)
        with torch.no_grad():
            expected = model.eval()(**batch).logits
        torch.testing.assert_close(logits_of(model, batch, Classes()), expected, rtol=0, atol=0)


def test_head_within_modules_to_save_and_tuple_outputs():
    model = tiny.tiny_llama(modules_to_save=["lm_head"])
    la = LaplaceLoRA(model, ANSWERS).fit([tiny.batch(4)], progress=False)
    batch = tiny.batch(3)
    expected = expected_logits(model, batch, tiny.ANSWERS).softmax(-1)
    torch.testing.assert_close(la.predict(batch, link_approx="map"), expected, rtol=1e-6, atol=1e-6)
    assert la.parameters_left_alone == []
    assert la.layers[-1].weights.W.shape == (3, 16)
