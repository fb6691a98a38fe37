"""The whole way from a batch to an answer: the linearised model's Gaussian f ~ N(f*, J (H + Lambda)^-1 J^T)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from laplace_lora_fast.errors import InvalidBatchError, NumericalError
from laplace_lora_fast.fitting.passes import BatchStep, Loader, Subject, run
from laplace_lora_fast.model.lora import Treated
from laplace_lora_fast.progress import track
from laplace_lora_fast.structures.base import Curvature, Structure

MAP_LINK = "map"  # the plain model's answer


@dataclass(frozen=True)
class LinearisedModel:
    """A model with the curvature of its LoRA weights.

    Attributes:
        subject: the model, its head and LoRA layers.
        structure: of the curvature.
        curvature: at the noise in force.
        shared_inputs: as the fit found them.
        n_outputs: U.
    """

    subject: Subject
    structure: Structure
    curvature: Curvature
    shared_inputs: list[int]
    n_outputs: int


@dataclass(frozen=True)
class Block:
    """The functions of examples that have the same number of them.

    Attributes:
        examples: their places among all examples, [N_b].
        mean: [N_b, K], or [G, N_b, K] where it depends on the prior.
        cov: [G, N_b, K, K].
        targets: as the likelihood has them; None if any batch had no labels.
    """

    examples: Tensor
    mean: Tensor
    cov: Tensor
    targets: Tensor | None


@dataclass
class _Group:
    """What has been seen of the examples with one number of functions."""

    seen: list[Any] = field(default_factory=list)
    gaussians: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    examples: list[Tensor] = field(default_factory=list)
    targets: list[Tensor | None] = field(default_factory=list)


def distribution(
    linearised: LinearisedModel,
    prior_precisions: Tensor,
    loader: Loader,
    *,
    plain_outputs: bool = False,
    what: str = "predict",
    progress: bool = False,
) -> list[Block]:
    """Gaussians of the examples' functions over a loader, for several priors in one pass.

    Args:
        linearised: the model and its curvature.
        prior_precisions: fp64 [n_weights, G].
        loader: batches.
        plain_outputs: whether the functions are the outputs themselves, not what the likelihood sees of them.
        what: name of the progress bar.
        progress: show it.

    Returns:
        A block for each number of functions that examples have, ascending: one where all have the same.

    Raises:
        InvalidBatchError: the loader is empty or a batch is unusable.
        NumericalError: a covariance is not finite.
    """
    weights = [layer.weights for layer in linearised.subject.layers if isinstance(layer, Treated)]
    predictor = linearised.structure.predictor(linearised.curvature, weights, prior_precisions)
    several_priors = prior_precisions.shape[1] > 1
    groups: dict[int, _Group] = {}
    n_examples = waiting = 0

    def take(step: BatchStep) -> None:
        nonlocal n_examples, waiting
        sizes, seen = step.functions.sizes, predictor.seen()
        targets: Sequence[Tensor | None] = step.targets or [None] * len(sizes)
        for index, size in enumerate(sizes):
            group = groups.setdefault(size, _Group())
            group.seen.append(seen[index])
            group.examples.append(step.functions.examples[index] + n_examples)
            group.targets.append(targets[index])
            waiting += size * len(step.functions.examples[index])
        n_examples += step.functions.n_examples
        if not several_priors and waiting >= predictor.together:
            _conclude(list(groups.values()))
            waiting = 0

    def _conclude(all_groups: Sequence[_Group]) -> None:
        # under one prior batch by batch, under several all together: no more than one prior's solution is held
        some = [
            (group, seen)
            for group in all_groups
            for seen in ([group.seen] if several_priors else [[each] for each in group.seen])
        ]
        gaussians = predictor.gaussians([seen for _, seen in some])
        for (group, _), gaussian in zip(some, gaussians, strict=True):
            group.gaussians.append(gaussian)
        for group in all_groups:
            group.seen = []

    run(
        linearised.subject,
        track(loader, what, progress),
        predictor,
        take,
        generator=torch.Generator(),
        shared_inputs=list(linearised.shared_inputs),
        n_outputs=linearised.n_outputs,
        plain_outputs=plain_outputs,
    )
    ordered = [groups[size] for size in sorted(groups)]
    _conclude(ordered)
    return [_block(group) for group in ordered]


def _block(group: _Group) -> Block:
    means, covs = zip(*group.gaussians, strict=True)
    cov = torch.cat(covs, 1)
    if not cov.isfinite().all():
        raise NumericalError(
            f"the predictive covariance is not finite in {cov.dtype}: use a larger prior_precision"
        )
    return Block(torch.cat(group.examples), torch.cat(means, -2), cov, _joined(group.targets))


def plain_answers(
    linearised: LinearisedModel, loader: Loader, progress: bool
) -> tuple[Tensor, Tensor | None]:
    """The plain model's answers [N, C] over a loader, and targets [N, ..] as `answers` gives them."""
    subject = linearised.subject
    parts: list[Answered] = []
    n_examples = 0

    def take(step: BatchStep) -> None:
        nonlocal n_examples
        targets: Sequence[Tensor | None] = step.targets or [None] * len(step.outputs)
        for outputs, examples, own in zip(step.outputs, step.functions.examples, targets, strict=True):
            answer = subject.likelihood.plain_answer(outputs)
            labels = None if own is None else subject.likelihood.judged_by(own)
            parts.append(Answered(examples + n_examples, answer[None], labels))
        n_examples += step.functions.n_examples

    run(
        subject,
        track(loader, "predict", progress),
        None,
        take,
        generator=torch.Generator(),
        n_outputs=linearised.n_outputs,
    )
    answers, targets = in_order(parts)
    return answers[0], targets


@dataclass(frozen=True)
class Answered:
    """Answers of some examples.

    Attributes:
        examples: their places among all examples, [N_b].
        answer: [G, N_b, C_b].
        targets: what they are judged by, [N_b, ..] or None.
    """

    examples: Tensor
    answer: Tensor
    targets: Tensor | None


def answers(
    linearised: LinearisedModel, blocks: Iterable[Block], link: str | None, n_samples: int, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Answers [G, N, C] of all examples in the loader's order, zero beyond the outputs of an example, and targets."""
    likelihood = linearised.subject.likelihood
    parts = []
    for block in blocks:
        generator = torch.Generator().manual_seed(seed)
        answer = likelihood.answer(block.mean, block.cov, link, n_samples, generator)
        labels = None if block.targets is None else likelihood.judged_by(block.targets)
        parts.append(Answered(block.examples, answer, labels))
    return in_order(parts)


def in_order(parts: Sequence[Answered]) -> tuple[Tensor, Tensor | None]:
    """All examples in their order: answers [G, N, C], and targets [N, ..] where all have them."""
    if len(parts) == 1:
        return parts[0].answer, parts[0].targets
    place = torch.cat([part.examples for part in parts])
    width = max(part.answer.shape[2] for part in parts)
    padded = torch.cat(
        [torch.nn.functional.pad(part.answer, (0, width - part.answer.shape[2])) for part in parts], 1
    )
    order = place.argsort()
    targets = _joined([part.targets for part in parts])
    return padded[:, order.to(padded.device)], None if targets is None else targets[order.to(targets.device)]


def one_block(blocks: Sequence[Block]) -> Block:
    """The block of examples that all have the same number of functions, its mean [G, N, K] or [N, K].

    Raises:
        InvalidBatchError: examples have different numbers of functions.
    """
    if len(blocks) > 1:
        sizes = [block.mean.shape[-1] for block in blocks]
        raise InvalidBatchError(f"the examples of a batch have {sizes} functions: pass those of one number")
    return blocks[0]


def require_labels(blocks: Iterable[Block], where: str) -> None:
    """Raises InvalidBatchError unless all blocks have targets."""
    if any(block.targets is None for block in blocks):
        raise InvalidBatchError(f"{where} needs 'labels' in every batch")


def _joined(targets: Sequence[Tensor | None]) -> Tensor | None:
    given = [target for target in targets if target is not None]
    return torch.cat(given) if len(given) == len(targets) else None
