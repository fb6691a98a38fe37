"""lm-polygraph: a run of its manager, whose estimators ask the posterior about the answers that it generates."""

import sys
import tempfile

import tokenizers
import toy
import transformers

from laplace_lora_fast import LaplaceLoRA, Tokens

try:
    from lm_polygraph.defaults.register_default_stat_calculators import register_default_stat_calculators
    from lm_polygraph.estimators import MaximumSequenceProbability
    from lm_polygraph.generation_metrics import RougeMetric
    from lm_polygraph.ue_metrics import RiskCoverageCurveAUC
    from lm_polygraph.utils.builder_enviroment_stat_calculator import BuilderEnvironmentStatCalculator
    from lm_polygraph.utils.dataset import Dataset
    from lm_polygraph.utils.manager import UEManager
    from lm_polygraph.utils.model import WhiteboxModel

    from laplace_lora_fast.integrations.lm_polygraph import (
        LaplaceMutualInformation,
        LaplaceVariance,
        container,
    )
except ImportError as error:
    sys.exit(print(error))

texts = [{"input_ids": b["input_ids"], "labels": b["input_ids"]} for b in toy.texts(32, seed=0)]
model, folder = toy.causal_model().eval(), tempfile.mkdtemp()
LaplaceLoRA(model, Tokens(samples=2)).fit(texts).save(folder)

words = {f"w{number}": number for number in range(toy.VOCABULARY)}  # yours comes with your model
core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=core, unk_token="w0", pad_token="w1", eos_token="w2", padding_side="left"
)
host = WhiteboxModel(model, tokenizer, model_path="toy")
manager = UEManager(
    Dataset(["w20 w21 w22", "w50 w51"], ["w23", "w52"], batch_size=2),
    host,
    [LaplaceVariance(), LaplaceMutualInformation(), MaximumSequenceProbability()],
    BuilderEnvironmentStatCalculator(host),
    [*register_default_stat_calculators("Whitebox", output_attentions=False), container(folder, n_samples=4)],
    [RougeMetric("rougeL")],
    [RiskCoverageCurveAUC()],
    processors=[],
    max_new_tokens=4,
    ignore_exceptions=False,
    verbose=False,
)
manager()
print(dict(manager.estimations))
