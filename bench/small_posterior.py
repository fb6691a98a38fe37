"""What a posterior of few examples weighs beside its adapter, and what its sketch costs in predictions.

    python -m bench.small_posterior --out bench/results

The demo's model, SmolLM2-135M, with LoRA of r = 16 on all linear layers, trained for an epoch on 80 movie reviews. The
default rows, as `save` writes them, beside those of whole Jacobians: bytes, and predictions on other reviews.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from laplace_lora_fast import Answers, LaplaceLoRA, Rows
from laplace_lora_fast.data.prompts import answer_token_ids, make_batches
from laplace_lora_fast.demo import task
from laplace_lora_fast.evaluation.provenance import provenance

PRECISIONS = (0.1, 1.0, 10.0, 100.0)
WHOLE = 10**6


def subject(examples: int, tests: int) -> tuple[Any, Answers, list[Any], list[Any]]:
    """Model with its trained adapter, task, training and test batches."""
    from peft import LoraConfig, get_peft_model

    recipe = replace(task.Recipe(), epochs=1, n_train=examples, n_val=tests)
    base, tokenizer = task.load_model()
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    train, test = task.split(recipe)
    answers = answer_token_ids(tokenizer, train)
    batches = make_batches(tokenizer, train, recipe.batch_size)
    task.fine_tune(model, batches, answers, recipe)
    return model, Answers(answers), batches, make_batches(tokenizer, test, recipe.batch_size)


def size(folder: Path) -> int:
    """Bytes of its files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(examples: int, tests: int) -> dict[str, Any]:
    """Sizes, and how far predictions are from those of whole rows."""
    model, answers, train, test = subject(examples, tests)
    sizes, found = {}, []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "adapter")
        sizes["adapter"] = sum(
            path.stat().st_size for path in (Path(folder) / "adapter").glob("*.safetensors")
        )
        for name, structure in (("default", Rows()), ("whole", Rows(columns=WHOLE))):
            la = LaplaceLoRA(model, answers, structure=structure, budget=2**34).fit(train, progress=False)
            la.save(Path(folder) / name)
            sizes[name] = size(Path(folder) / name)
            mean, cov = zip(
                *(la.logit_distribution(batch, prior_precision=list(PRECISIONS)) for batch in test),
                strict=True,
            )
            probs = torch.cat([la.predict(batch, prior_precision=list(PRECISIONS)) for batch in test], 1)
            contrast = torch.cat(cov, 1)
            variance = contrast[..., 0, 0] + contrast[..., 1, 1] - 2 * contrast[..., 0, 1]
            found.append((probs[..., 0], variance))
            del la, mean
    (probs, variance), (whole_probs, whole_variance) = found
    ratio = variance / whole_variance
    return {
        "examples": examples,
        "tests": probs.shape[1],
        "bytes": sizes,
        "default_over_adapter": sizes["default"] / sizes["adapter"],
        "precisions": PRECISIONS,
        "largest_difference_of_probability": (probs - whole_probs).abs().max(1).values.tolist(),
        "largest_relative_difference_of_probability": (
            (probs - whole_probs).abs() / torch.minimum(whole_probs, 1 - whole_probs)
        )
        .max(1)
        .values.tolist(),
        "median_variance_ratio": ratio.median(1).values.tolist(),
        "variance_ratio_q05": ratio.quantile(0.05, 1).tolist(),
        "variance_ratio_q95": ratio.quantile(0.95, 1).tolist(),
    }


def main() -> None:
    """Writes small_posterior.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=80)
    parser.add_argument("--tests", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    result = measure(arguments.examples, arguments.tests) | {
        "environment": provenance(("torch", "transformers", "peft"))
    }
    print(json.dumps(result, indent=1))
    (arguments.out / "small_posterior.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
