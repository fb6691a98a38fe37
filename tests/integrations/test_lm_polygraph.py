"""lm-polygraph runs its own manager on our model, offline, where it is installed: `make integrations`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from laplace_lora_fast import Answers, LaplaceLoRA, Tokens
from laplace_lora_fast.data import text_batches
from tests import tiny, words
from tests.cli.test_texts import texts

PROMPTS = ["good film", "a dull plot", "the nice film", "poor"]


@pytest.fixture(scope="module")
def manager():
    """The module; imported first by whoever runs this, as its imports take long."""
    return pytest.importorskip("lm_polygraph.utils.manager", exc_type=ImportError)


def model_and_tokenizer():
    import peft

    tokenizer = words.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "[END]", "pad_token": "[PAD]"})
    tokenizer.padding_side = "left"
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(words.base_model(), config)
    tiny.randomise(model, seed=1)
    return model.eval(), tokenizer


def test_a_run_of_the_host(manager, tmp_path: Path) -> None:
    """Its own greedy answers; their variance is the library's, their probability the model's.

    The host's own log-likelihoods are the same from the third token on: it forbids an end among the first two, and
    leaves its probability out there.
    """
    from lm_polygraph.defaults.register_default_stat_calculators import register_default_stat_calculators
    from lm_polygraph.estimators import MaximumSequenceProbability
    from lm_polygraph.generation_metrics import RougeMetric
    from lm_polygraph.ue_metrics import RiskCoverageCurveAUC
    from lm_polygraph.utils.builder_enviroment_stat_calculator import BuilderEnvironmentStatCalculator
    from lm_polygraph.utils.dataset import Dataset
    from lm_polygraph.utils.model import WhiteboxModel

    from laplace_lora_fast.integrations import lm_polygraph as own

    model, tokenizer = model_and_tokenizer()
    la = LaplaceLoRA(model, Tokens(samples=2), seed=3)
    la.fit(text_batches(tokenizer, texts(6, seed=0), 3), progress=False).save(tmp_path)
    host = WhiteboxModel(model, tokenizer, model_path="tiny")
    estimators = [own.LaplaceVariance(), own.LaplaceMutualInformation(), MaximumSequenceProbability()]
    run = manager.UEManager(
        Dataset(PROMPTS, ["good", "bad", "fine", "dull"], batch_size=2),
        host,
        estimators,
        BuilderEnvironmentStatCalculator(host),
        [*register_default_stat_calculators("Whitebox", output_attentions=False), own.container(tmp_path, 4)],
        [RougeMetric("rougeL")],
        [RiskCoverageCurveAUC()],
        [],
        ignore_exceptions=False,
        verbose=False,
        max_new_tokens=5,
        save_stats=["greedy_log_likelihoods", own.LOG_PROBS],
    )
    scores = run()
    assert {name for _, name, _, _ in scores} >= {str(each) for each in estimators}
    found = {name: run.estimations["sequence", name] for name in map(str, estimators)}
    assert len(found["LaplaceVariance"]) == len(PROMPTS)
    for place, answer in enumerate(run.stats["greedy_tokens"]):
        prompt = tokenizer(PROMPTS[place])["input_ids"]
        batch = {
            "input_ids": torch.tensor([[*prompt, *answer]]),
            "labels": torch.tensor([[-100] * len(prompt) + list(answer)]),
        }
        mean, variance = la.sequence_log_prob(batch)
        assert found["LaplaceVariance"][place] == pytest.approx(float(variance.sqrt()), rel=1e-4)
        assert run.stats[own.LOG_PROBS][place] == pytest.approx(float(mean), rel=1e-4)
        logits = model(batch["input_ids"]).logits[0, len(prompt) - 1 : -1]
        plain = logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
        assert float(mean) == pytest.approx(float(plain.sum()), rel=1e-4)
        of_host = torch.tensor(run.stats["greedy_log_likelihoods"][place][2:])
        torch.testing.assert_close(of_host, plain[2:].float(), rtol=1e-3, atol=1e-4)
        information = la.token_uncertainty(batch, n_samples=4).epistemic[0, len(prompt) :]
        assert found["LaplaceMutualInformation"][place] == pytest.approx(float(information.mean()), rel=1e-3)


def test_a_posterior_of_answers_is_refused(manager, tmp_path: Path) -> None:
    import types

    from laplace_lora_fast.integrations import lm_polygraph as own

    model, _ = model_and_tokenizer()
    LaplaceLoRA(model, Answers([5, 7])).fit([tiny.batch(4, vocab=16, classes=2)], progress=False).save(
        tmp_path
    )
    environment = types.SimpleNamespace(model=types.SimpleNamespace(model=model))
    with pytest.raises(ValueError, match="says nothing of generated answers"):
        own.load_stat_calculator({"posterior": tmp_path}, environment)
