"""lm-evaluation-harness: `--model laplace`, log predictive probabilities of options in the place of log-likelihoods.

    python -m laplace_lora_fast.integrations.lm_eval --model laplace \
        --model_args pretrained=base,peft=adapter,posterior=posterior --tasks arc_easy

is `lm_eval` with this model known to it; in Python, importing this module is enough. Written for lm-eval 0.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from laplace_lora_fast.data.groups import batched
from laplace_lora_fast.data.prompts import batches_from_ids
from laplace_lora_fast.integrations.hosts import require
from laplace_lora_fast.laplace import LaplaceLoRA
from laplace_lora_fast.tasks import Answers, Options

require("lm-eval", ["0.4"])

from lm_eval.api.registry import register_model  # noqa: E402  which may not be there
from lm_eval.models.huggingface import HFLM  # noqa: E402
from peft import PeftModel  # noqa: E402

Pair = tuple[list[int], list[int]]  # tokens of a context and of a continuation


@register_model("laplace")
class LaplaceLM(HFLM):
    """A PEFT model with its posterior, for tasks of multiple choice.

    The requests of one document are its options. Each gets the log of its predictive probability among them, so that
    the harness's `acc` and its calibration are those of `la.predict`, and its `perplexity` of options a proper score. A
    posterior of `Options` scores options of any length, one of `Answers` those that are its answers.

    Args:
        pretrained: the base model.
        peft: the adapter.
        posterior: the folder that `LaplaceLoRA.save` wrote.
        link_approx: as for `LaplaceLoRA.predict`; "map" for the plain adapter.
        options: what `--model hf` takes beside.
    """

    def __init__(
        self, pretrained: str, peft: str, posterior: str, link_approx: str | None = None, **options: Any
    ) -> None:
        super().__init__(pretrained=pretrained, **options)
        # not by the harness, which cuts embeddings with more rows than the tokenizer has tokens: another model
        self._model: Any = PeftModel.from_pretrained(self.model, peft).eval()
        self._link = link_approx
        self.laplace = LaplaceLoRA.load(posterior, self.model)
        if not isinstance(self.laplace.task, Answers | Options):
            raise ValueError(f"a posterior of {self.laplace.task!r} scores no options: fit with Options()")

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log predictive probability, whether it is the likeliest) of each request among those of its document.

        Raises:
            ValueError: a document has one request only, or the same twice; or options are none of the answers.
        """
        pairs = [self._encoded(*request.args) for request in requests]
        groups: dict[Any, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault((request.task_name, request.doc_id, request.args[0] == ""), []).append(place)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for places, log_probs in self._log_probs(list(groups.values()), pairs):
            best = int(log_probs.argmax())
            for index, (place, value) in enumerate(zip(places, log_probs.tolist(), strict=True)):
                found[place] = (value, index == best)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Refused: texts without alternatives have no predictive probability here."""
        raise ValueError(
            "--model laplace scores options against each other, not running text: use --model hf"
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Refused: what the harness would generate is the plain adapter's."""
        raise ValueError(
            "--model laplace scores options and generates nothing: use --model hf, or la.generate"
        )

    def _encoded(self, context: str, continuation: str) -> Pair:
        if context == "":
            return [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
        one, other = self._encode_pair(context, continuation)
        return list(one), list(other)

    def _log_probs(self, groups: list[list[int]], pairs: list[Pair]) -> list[tuple[list[int], Tensor]]:
        """Places and log probabilities of every group."""
        for places in groups:
            texts = [tuple(map(tuple, pairs[place])) for place in places]
            if len(places) < 2 or len(set(texts)) < len(texts):
                raise ValueError(
                    "--model laplace needs documents with two or more different options: one has "
                    f"{len(places)} request(s) of {len(set(texts))} text(s)"
                )
        size = int(self.batch_size) if str(self.batch_size).isdigit() else 8
        if isinstance(self.laplace.task, Answers):
            return self._answers(groups, pairs, size)
        order = sorted(
            range(len(groups)), key=lambda g: max(len(pairs[p][0]) + len(pairs[p][1]) for p in groups[g])
        )
        results = []
        for start in range(0, len(order), size):
            some = [groups[g] for g in order[start : start + size]]
            listed = [
                (
                    [[*pairs[p][0], *pairs[p][1]] for p in places],
                    [[False] * len(pairs[p][0]) + [True] * len(pairs[p][1]) for p in places],
                    None,
                )
                for places in some
            ]
            kept = sorted(
                range(len(some)), key=lambda g: max(map(len, listed[g][0]))
            )  # as `batched` orders them
            (batch,) = batched(listed, len(listed))
            probs = self.laplace.predict(batch, link_approx=self._link)
            results += [(some[g], probs[row, : len(some[g])].double().log()) for row, g in enumerate(kept)]
        return results

    def _answers(
        self, groups: list[list[int]], pairs: list[Pair], size: int
    ) -> list[tuple[list[int], Tensor]]:
        task = self.laplace.task
        assert isinstance(task, Answers)
        answers = [tuple(tokens) for tokens in task.spellings]
        results = []
        for places in groups:
            options = [tuple(pairs[place][1]) for place in places]
            if sorted(options) != sorted(answers) or len({tuple(pairs[p][0]) for p in places}) > 1:
                raise ValueError(
                    f"the posterior's answers are the tokens {answers}, a document's options are {options}: fit with "
                    "Options()"
                )
            (batch,) = batches_from_ids([(pairs[places[0]][0], 0)], 1)
            probs = self.laplace.predict(batch, link_approx=self._link)[0]
            results.append((places, probs[[answers.index(option) for option in options]].double().log()))
        return results


def main() -> None:
    """The harness's own command."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
