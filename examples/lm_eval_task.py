"""lm-evaluation-harness with a posterior: a task of its own, offline, scored by predictive probabilities."""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()
import tokenizers
import toy
import transformers

from laplace_lora_fast import LaplaceLoRA, Options
from laplace_lora_fast.data import option_batches

try:
    from laplace_lora_fast.integrations.lm_eval import LaplaceLM
except ImportError as error:
    sys.exit(print(error))
import lm_eval.tasks

WORDS = {"<pad>": 0, "<end>": 1, **{f"w{number}": number for number in range(2, toy.VOCABULARY)}}
TASK = """
{task: weather, dataset_path: json, dataset_kwargs: {data_files: {test: FILE}}, output_type: multiple_choice,
test_split: test, doc_to_text: "{{prompt}}", doc_to_choice: choices, doc_to_target: label, metric_list: [{metric: acc}]}
"""
core = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<pad>"))
core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<pad>")


def rows(n, seed):
    """Which word fits the weather."""
    prompts = [words for batch in toy.texts(n, seed) for words in batch["input_ids"]]
    labels = [label for batch in toy.texts(n, seed) for label in batch["labels"].tolist()]
    texts = [" ".join(f"w{word}" for word in words.tolist()) for words in prompts]
    return [
        {"prompt": t, "choices": ["w5", "w11 w12"], "label": y} for t, y in zip(texts, labels, strict=True)
    ]


with tempfile.TemporaryDirectory() as name:
    folder, model = Path(name), toy.causal_model()
    la = LaplaceLoRA(model, Options()).fit(option_batches(tokenizer, rows(32, seed=0), 16))
    la.save(folder / "posterior")
    model.save_pretrained(folder / "adapter")
    model.unload().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(16, seed=1)))
    (folder / "weather.yaml").write_text(TASK.replace("FILE", str(folder / "test.jsonl")))
    places = {key: str(folder / place) for key, place in (("pretrained", "base"), ("peft", "adapter"))}
    lm = LaplaceLM(**places, posterior=str(folder / "posterior"), device="cpu", batch_size=8)
    tasks = lm_eval.tasks.TaskManager(include_path=name, include_defaults=False)
    print(lm_eval.simple_evaluate(lm, tasks=["weather"], task_manager=tasks, bootstrap_iters=0)["results"])
