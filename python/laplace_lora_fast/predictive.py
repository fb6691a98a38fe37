"""What a fitted posterior answers: predictions, distributions of the outputs, rewards. The facade's half that reads."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_lora_fast.evaluation.predictions import LabelPredictions, Predictions, RegressionPredictions
from laplace_lora_fast.evaluation.rewards import Rewards
from laplace_lora_fast.evaluation.uncertainty import Uncertainty
from laplace_lora_fast.fitting.passes import Loader
from laplace_lora_fast.model.batches import Batch, without_labels
from laplace_lora_fast.model.contexts import undisturbed_methods
from laplace_lora_fast.prediction import (
    MAP_LINK,
    Block,
    answers,
    distribution,
    one_block,
    plain_answers,
)
from laplace_lora_fast.prior.grid import checked_link
from laplace_lora_fast.prior.precision import PriorPrecision, PriorPrecisions
from laplace_lora_fast.state import LaplaceState


@undisturbed_methods
class LaplacePredictive(LaplaceState):
    """The posterior predictive of the linearised model; `LaplaceLoRA` adds fitting, tuning and files."""

    def logit_distribution(
        self, batch: Batch, prior_precision: PriorPrecisions | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean [N, C] and covariance [N, C, C] of the linearised model's outputs; C backward passes.

        Args:
            batch: as for `fit`; labels are ignored.
            prior_precision: another one than the current, or a list of G: the covariance is then [G, N, C, C], and the
                mean of a refitted model [G, N, C].

        Returns:
            fp32 (fp64 for an fp64 model).
        """
        precisions, several = self._priors(prior_precision)
        block = one_block(self._distribution([without_labels(batch)], precisions, plain_outputs=True))
        if several:
            return block.mean, block.cov
        return block.mean[0] if block.mean.dim() == 3 else block.mean, block.cov[0]

    def predict(
        self,
        batch: Batch,
        *,
        link_approx: str | None = None,
        n_samples: int | None = None,
        prior_precision: PriorPrecisions | None = None,
    ) -> Tensor:
        """Predictive answers for one batch.

        Args:
            batch: as for `fit`; labels are ignored.
            link_approx: classification: "probit" (the default: pairwise, invariant to shifts of the logits), "mc"
                (seeded Monte-Carlo softmax), "bridge" (Laplace bridge) or "map" (the plain model). All but "map" take
                C - 1 backward passes.
            n_samples: of the "mc" link; None for 1,000.
            prior_precision: another one than the current, or a list of G: the result then has a leading axis G.

        Returns:
            [N, C]: probabilities of a classification, means of a regression (see `predictive_variance`).
        """
        precisions, several = self._priors(prior_precision)
        result, _ = self._answers([without_labels(batch)], link_approx, n_samples, precisions, False)
        return result if several else result[0]

    def predictive_variance(self, batch: Batch, prior_precision: PriorPrecisions | None = None) -> Tensor:
        """Variance [N, C] of a regression's targets, with the noise in it; a list of priors gives a leading axis.

        Raises:
            ValueError: the task is no regression.
        """
        if not self.likelihood.has_noise:
            raise ValueError(f"{self.task!r} predicts probabilities: see logit_distribution for covariances")
        precisions, several = self._priors(prior_precision)
        variance = self._variance(one_block(self._distribution([without_labels(batch)], precisions)))
        return variance if several else variance[0]

    def uncertainty(
        self,
        batch: Batch,
        *,
        n_samples: int | None = None,
        prior_precision: PriorPrecision | None = None,
    ) -> Uncertainty:
        """How unsure each answer is, and how much of that is the model's own not knowing.

        Entropies of classes, options and labels, over the Gaussian of the linearised model; variances of a regression.

        Args:
            batch: as for `fit`; labels are ignored.
            n_samples: points of a seeded, scrambled Sobol sequence that the entropies are averaged over; None for
                1,024. A regression's variances are in closed form and take none.
            prior_precision: another one than the current.

        Returns:
            `total`, `aleatoric` and `epistemic`, one value an example (a label, an output), in the batch's order.

        Raises:
            ValueError: the task's likelihood does not say what is aleatoric, or `n_samples` would not be looked at.
        """
        self._require_answers()
        precisions = self._resolve(prior_precision)[:, None]
        parts = []
        for block in self._distribution([without_labels(batch)], precisions):
            mean = block.mean[0] if block.mean.dim() == 3 else block.mean
            generator = torch.Generator().manual_seed(self.seed)
            both = self.likelihood.uncertainty(mean, block.cov[0], n_samples, generator, self._known_noise())
            parts.append((block.examples, torch.stack([each.cpu() for each in both], 1)))
        order = torch.cat([examples for examples, _ in parts]).argsort()
        total, aleatoric = torch.cat([values for _, values in parts])[order].unbind(1)
        return Uncertainty(total, aleatoric)

    def reward(self, batch: Batch, prior_precision: PriorPrecision | None = None) -> Rewards:
        """Joint Gaussian of the scores of each example's sequences, for best-of-n under uncertainty.

        Args:
            batch: one of `Preference`, `Options` or another task whose examples are groups; labels are ignored.
            prior_precision: another one than the current.

        Returns:
            `Rewards`: means, standard deviations and covariances, example by example. One backward pass.

        Raises:
            ValueError: the task's examples are single sequences.
        """
        if not self._head.grouped:
            raise ValueError(f"{self.task!r} has no groups of sequences: see predict and logit_distribution")
        precisions = self._resolve(prior_precision)[:, None]
        blocks = self._distribution([without_labels(batch)], precisions, plain_outputs=True)
        return Rewards.of_groups(
            (b.examples, b.mean.reshape(b.cov[0, ..., 0].shape), b.cov[0]) for b in blocks
        )

    def predictions(
        self,
        loader: Loader,
        *,
        link_approx: str | None = None,
        n_samples: int | None = None,
        prior_precision: PriorPrecision | None = None,
        progress: bool = True,
    ) -> Predictions | LabelPredictions | RegressionPredictions:
        """`predict` over a loader, with the labels.

        Returns:
            Of all examples in the loader's order, with `metrics()`: `Predictions` of classes (`plot()` too),
            `LabelPredictions` of independent labels, `RegressionPredictions` of means and variances.

            Rows of examples with fewer options than others end in zeros. Labels are None if not all batches have them;
            labels that are there have to be valid: leave out the -1 of an unlabelled test set.
        """
        precisions = self._resolve(prior_precision)[:, None]
        if not self.likelihood.has_noise:
            result, labels = self._answers(loader, link_approx, n_samples, precisions, progress)
            kind = Predictions if self.likelihood.gives_classes else LabelPredictions
            return kind(result[0], labels)
        checked_link(self.likelihood, link_approx, n_samples)
        block = one_block(self._distribution(loader, precisions, progress=progress))
        mean = block.mean[0] if block.mean.dim() == 3 else block.mean
        return RegressionPredictions(mean, self._variance(block)[0], block.targets)

    def _answers(
        self,
        loader: Loader,
        link_approx: str | None,
        n_samples: int | None,
        precisions: Tensor,
        progress: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Answers [G, N, C] and labels of a loader."""
        self._require_answers()
        link, count = checked_link(self.likelihood, link_approx, n_samples, also=[MAP_LINK])
        with self._linearised(self._known_noise()) as linearised:
            if link == MAP_LINK:
                plain, labels = plain_answers(linearised, loader, progress)
                return plain.expand(precisions.shape[1], *plain.shape), labels
            blocks = distribution(linearised, precisions, loader, progress=progress)
            return answers(linearised, blocks, link, count, self.seed)

    def _distribution(self, loader: Loader, precisions: Tensor, **options: bool) -> list[Block]:
        self._require_answers()
        with self._linearised(self._known_noise()) as linearised:
            return distribution(linearised, precisions, loader, **options)  # type: ignore[arg-type]

    def _require_answers(self) -> None:
        """Raises ValueError for a task whose answers are too many for a covariance."""
        if self.likelihood.sampled:
            raise ValueError(
                f"{self.task!r} has a distribution over the vocabulary at each token, not one answer: see "
                "token_uncertainty, sequence_log_prob and generate"
            )

    def _variance(self, block: Block) -> Tensor:
        variance = block.cov.diagonal(dim1=-2, dim2=-1)
        return variance + self.likelihood.noise_variance(self._known_noise(), variance)
