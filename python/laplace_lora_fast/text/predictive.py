"""What a fitted posterior says of text: of tokens, of sequences, while generating. The facade's third part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from laplace_lora_fast.fitting.passes import Subject
from laplace_lora_fast.likelihoods import SampledTokens
from laplace_lora_fast.model.batches import Batch
from laplace_lora_fast.model.contexts import undisturbed_methods
from laplace_lora_fast.model.tokens.heads import LabelScoreHead
from laplace_lora_fast.options import check_choice, integer, positive_integer
from laplace_lora_fast.prediction import distribution, one_block
from laplace_lora_fast.predictive import LaplacePredictive
from laplace_lora_fast.prior.precision import PriorPrecision
from laplace_lora_fast.sampling.measures import TokenUncertainty
from laplace_lora_fast.sampling.proof import require_forward_mode
from laplace_lora_fast.sampling.samples import PosteriorSamples
from laplace_lora_fast.sampling.tokens import drawn_steps, token_uncertainty, with_labels
from laplace_lora_fast.text.generation import Decoding, generate, left_padded
from laplace_lora_fast.text.prompts import end_tokens, prompt_batch
from laplace_lora_fast.text.result import Generation, pieces_of


@undisturbed_methods
class LaplaceText(LaplacePredictive):
    """Samples of the weights, and what they say of text; `LaplaceLoRA` adds fitting, tuning and files."""

    def sample(
        self, n: int, *, seed: int | None = None, prior_precision: PriorPrecision | None = None
    ) -> PosteriorSamples:
        """Draws n samples of the LoRA weights, and keeps them beside the model.

        Args:
            n: how many.
            seed: of the random numbers; None for the posterior's own.
            prior_precision: another one than the current.

        Returns:
            `PosteriorSamples`: `apply(function)` and `outputs(batch)` evaluate the linearised model under each.

        Raises:
            ValueError: `n` is no positive integer, or the structure draws no samples.
        """
        n, seed = positive_integer("n", n), self._seed(seed)
        prior = self._resolve(prior_precision)
        with self._linearised(self._known_noise()) as linearised:
            steps = drawn_steps(linearised, prior, n, seed)
        shown = self.prior_precision if prior_precision is None else prior_precision
        subject = Subject(self.model, self._head, self.layers, self.likelihood)
        return PosteriorSamples(subject, steps, self._unchanged, f"prior_precision={shown!r}, seed={seed}")

    def token_uncertainty(
        self,
        batch: Batch,
        *,
        n_samples: int = 16,
        seed: int | None = None,
        prior_precision: PriorPrecision | None = None,
    ) -> TokenUncertainty:
        """Uncertainty about every token of a text, given those before it; `.sequence()` has that of whole texts.

        By samples of the linearised model, shared by all tokens: about two forward passes a sample.

        Args:
            batch: `input_ids` [N, T] and `attention_mask`; of tokens with `labels` other than -100, or of all but the
                first where there are no labels.
            n_samples: of the weights.
            seed: of the samples; None for the posterior's own.
            prior_precision: another one than the current.

        Returns:
            `TokenUncertainty`, [N, T] each: total, aleatoric, epistemic, epkl, rmi.

        Raises:
            InvalidBatchError: the batch is unusable.
            UnsupportedAdapterError: something in the model has no forward-mode derivative.
            ValueError: the model is no causal language model, or the structure draws no samples.
        """
        self._require_all_tokens()
        n, seed = positive_integer("n_samples", n_samples), self._seed(seed)
        with self._linearised(self._known_noise()) as linearised:
            steps = drawn_steps(linearised, self._resolve(prior_precision), n, seed)
            require_forward_mode(linearised, steps, with_labels(batch))
            return token_uncertainty(linearised, steps, batch)

    def sequence_log_prob(
        self, batch: Batch, *, score: str = "sum", prior_precision: PriorPrecision | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log probability of each text, and its variance under the posterior of the linearised model.

        In closed form: one backward pass, no samples.

        Args:
            batch: as for `token_uncertainty`.
            score: "sum" over the labelled tokens, or their "mean".
            prior_precision: another one than the current.

        Returns:
            Mean [N] and variance [N].
        """
        self._require_all_tokens()
        mean_score = check_choice("score", score, ["sum", "mean"]) == "mean"
        head = LabelScoreHead(self._peft_model, mean_score)
        precisions = self._resolve(prior_precision)[:, None]
        with self._linearised(self._known_noise()) as linearised:
            subject = replace(linearised.subject, head=head, likelihood=SampledTokens())
            scored = replace(linearised, subject=subject, n_outputs=1)
            block = one_block(distribution(scored, precisions, [with_labels(batch)], plain_outputs=True))
        return block.mean.reshape(-1), block.cov[0, :, 0, 0]

    def generate(
        self,
        prompts: str | Sequence[Any] | Batch,
        tokenizer: Any = None,
        *,
        n_samples: int = 16,
        max_new_tokens: int = 64,
        do_sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int | None = None,
        prior_precision: PriorPrecision | None = None,
    ) -> Generation:
        """Answers prompts with the mixture of samples of the linearised model, and says how sure each token is.

        Args:
            prompts: a text, texts, or chats (lists of {"role", "content"}), for which a tokenizer is needed; or a batch
                of `input_ids` and `attention_mask`.
            tokenizer: of the model; with it the result has texts.
            n_samples: of the weights.
            max_new_tokens: most tokens of an answer.
            do_sample: draw each token from the mixture, rather than take the likeliest.
            temperature: of drawing; the uncertainty is that of the mixture as it is.
            top_k: draw among so many of the likeliest only.
            top_p: draw among the likeliest that together have this probability only.
            eos_token_id: what ends an answer; None for the model's own.
            seed: of samples and draws; None for the posterior's own.
            prior_precision: another one than the current.

        Returns:
            `Generation`: tokens, texts, uncertainty of each token and `.sequence()`; shown in colours by notebooks.

        Raises:
            InvalidBatchError: a prompt is empty, or too long for the model's context with its answer.
            UnsupportedAdapterError: something in the model has no forward-mode derivative.
            ValueError: an argument is not one of its choices or would have no effect; the model has no cache; the
                structure draws no samples.
        """
        self._require_all_tokens()
        n, seed = positive_integer("n_samples", n_samples), self._seed(seed)
        ends = end_tokens(self._peft_model, eos_token_id)
        how = Decoding(max_new_tokens, do_sample, temperature, top_k, top_p, ends, seed)
        batch, asked = prompt_batch(prompts, tokenizer)
        batch = left_padded(batch)
        with self._linearised(self._known_noise()) as linearised:
            steps = drawn_steps(linearised, self._resolve(prior_precision), n, seed)
            require_forward_mode(linearised, steps, with_labels(batch))
            found = generate(self.model, self.layers, steps, batch, how)
        if tokenizer is None:
            return Generation(found)
        answers = [row[keep].tolist() for row, keep in zip(found.tokens, found.mask, strict=True)]
        return Generation(
            found,
            [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers],
            [pieces_of(tokenizer, *both) for both in zip(asked, answers, strict=True)],
            [tokenizer.decode(prompt) for prompt in asked],
        )

    def _seed(self, seed: int | None) -> int:
        return self.seed if seed is None else integer("seed", seed)

    def _require_all_tokens(self) -> None:
        """Raises ValueError where the posterior knows some tokens of the vocabulary only."""
        narrow = [layer.name for layer in self.layers if layer.features is not None]
        if narrow:
            raise ValueError(
                f"layer {narrow[0]!r} has a posterior for the answers' tokens only: fit with Tokens() to ask about text"
            )
