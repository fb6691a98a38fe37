"""What a fitted posterior says of text: of tokens, of sequences, while generating. The facade's third part."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from laplace_lora_fast.fitting.passes import Subject
from laplace_lora_fast.likelihoods import SampledTokens
from laplace_lora_fast.model.batches import Batch
from laplace_lora_fast.model.tokens.heads import LabelScoreHead
from laplace_lora_fast.options import check_choice, integer, positive_integer
from laplace_lora_fast.prediction import distribution, one_block
from laplace_lora_fast.predictive import LaplacePredictive
from laplace_lora_fast.prior.precision import PriorPrecision
from laplace_lora_fast.sampling.measures import TokenUncertainty
from laplace_lora_fast.sampling.samples import PosteriorSamples
from laplace_lora_fast.sampling.tokens import drawn_steps, token_uncertainty, with_labels


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
        n, seed = positive_integer("n", n), self.seed if seed is None else integer("seed", seed)
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
        n = positive_integer("n_samples", n_samples)
        seed = self.seed if seed is None else integer("seed", seed)
        with self._linearised(self._known_noise()) as linearised:
            steps = drawn_steps(linearised, self._resolve(prior_precision), n, seed)
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

    def _require_all_tokens(self) -> None:
        """Raises ValueError where the posterior knows some tokens of the vocabulary only."""
        narrow = [layer.name for layer in self.layers if layer.features is not None]
        if narrow:
            raise ValueError(
                f"layer {narrow[0]!r} has a posterior for the answers' tokens only: fit with Tokens() to ask about text"
            )
