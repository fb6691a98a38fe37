"""What a model answers: public objects, and nothing else.

A task says which numbers the model gives for a sequence (its head), which sequences make an example, and what the
examples' outputs say about the labels (its likelihood). A plug: a frozen dataclass here or elsewhere with one
`register` line, a head, and at most one likelihood.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from laplace_lora_fast.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    PlackettLuce,
    SampledTokens,
    by_name,
)
from laplace_lora_fast.model.heads import (
    ChoiceHead,
    ClassHead,
    Head,
    OutputFn,
    OutputHead,
    RewardHead,
    innermost,
)
from laplace_lora_fast.model.heads.causal import AnswerHead, OptionHead
from laplace_lora_fast.model.heads.implicit import ImplicitRewardHead
from laplace_lora_fast.model.tokens.heads import SampledLabelsHead
from laplace_lora_fast.options import check_choice, positive_integer, positive_number, register


class Task(ABC):
    """What a model answers.

    Attributes:
        code: fields that are code: no file holds them, so that `load` has to be given the task.
    """

    code: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def head(self, model: nn.Module) -> Head:
        """What reads the answers off the model's output. Raises ValueError for a model that cannot give them."""

    @property
    @abstractmethod
    def likelihood(self) -> Likelihood:
        """What the outputs say about the labels."""


@register
@dataclass(frozen=True)
class AnyOf:
    """Tokens that all spell one answer of `Answers`, " yes" and "Yes" say: their probabilities add up.

    Not an answer of several tokens, one behind the other: those are for `Options`.

    Args:
        tokens: of the answer, in any order.

    Raises:
        ValueError: no tokens, or other things.
    """

    tokens: Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", _integers("tokens", self.tokens, least=1))


@register
@dataclass(frozen=True)
class Answers(Task):
    """The answer of a causal language model to a prompt, one of C >= 2 tokens: softmax over their logits.

    The logits are those at the last real position of `input_ids`; `labels` [N] index `token_ids`. Of an answer that
    several tokens spell it is the logsumexp of theirs.

    Args:
        token_ids: of the answers, in the order of the classes: a token each, or `AnyOf` several.

    Raises:
        ValueError: not at least two answers, or a token stands there twice.
    """

    token_ids: Sequence[int | AnyOf]

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", _checked_tokens(self.token_ids))

    @property
    def spellings(self) -> list[list[int]]:
        """The tokens of each answer."""
        return [list(answer.tokens) if isinstance(answer, AnyOf) else [answer] for answer in self.token_ids]

    def head(self, model: nn.Module) -> Head:
        return AnswerHead(model, self.spellings)

    @property
    def likelihood(self) -> Likelihood:
        return Categorical()


@register
@dataclass(frozen=True)
class Classes(Task):
    """The classes of a sequence classifier: softmax over its `logits` [N, C]; `labels` [N]."""

    def head(self, model: nn.Module) -> Head:
        _refuse_problem(model, self, ("regression", "multi_label_classification"))
        return ClassHead(model)

    @property
    def likelihood(self) -> Likelihood:
        return Categorical()


@register
@dataclass(frozen=True)
class MultiLabel(Task):
    """C independent yes-or-no labels of a sequence classifier's `logits` [N, C]; `labels` [N, C] zeros and ones."""

    def head(self, model: nn.Module) -> Head:
        _refuse_problem(model, self, ("regression", "single_label_classification"))
        return ClassHead(model)

    @property
    def likelihood(self) -> Likelihood:
        return Bernoulli()


@register
@dataclass(frozen=True)
class Regression(Task):
    """The outputs `logits` [N, C] of a regression head with Gaussian noise; `labels` [N] or [N, C].

    Args:
        noise: its standard deviation; None to have it tuned with the prior precision. Until then it is the one that
            maximises the evidence at the prior precision of the fit.
        scales: what the noise is multiplied with for each of C outputs: with noise=1.0 these are the noises
            themselves, with None what they have in common is tuned. None for one noise of all.
    """

    noise: float | None = None
    scales: Sequence[float] | None = None

    def __post_init__(self) -> None:
        made = Gaussian(self.noise, self.scales)
        object.__setattr__(self, "noise", made.noise)
        object.__setattr__(self, "scales", made.scales)

    def head(self, model: nn.Module) -> Head:
        _refuse_problem(model, self, ("single_label_classification", "multi_label_classification"))
        return ClassHead(model)

    @property
    def likelihood(self) -> Likelihood:
        return Gaussian(self.noise, self.scales)


@register
@dataclass(frozen=True)
class Options(Task):
    """Which of an example's options a language model finds most likely: softmax over their scores.

    An option is any text; its score is the log probability of its tokens behind the prompt. Examples may have different
    numbers of options. A batch has one sequence an option (prompt and option), "option_mask" [S, T], true at the
    option's tokens, "group" [S], the example of each sequence, and `labels` [N]: see `data.option_batches`. For models
    with a multiple-choice head, batches are theirs: `input_ids` [N, C, T].

    One backward pass a batch, whatever the number of options. With options of one token it is `Answers`.

    Args:
        score: "sum" of the tokens' log probabilities, or their "mean".
    """

    score: str = "sum"

    def __post_init__(self) -> None:
        check_choice("score", self.score, ["sum", "mean"])

    def head(self, model: nn.Module) -> Head:
        if "MultipleChoice" not in type(innermost(model)).__name__:
            return OptionHead(model, self.score == "mean")
        if self.score != "sum":
            raise ValueError("a multiple-choice head gives one score an option: leave score='mean' out")
        return ChoiceHead(model)

    @property
    def likelihood(self) -> Likelihood:
        return Categorical()


@register
@dataclass(frozen=True)
class Preference(Task):
    """Which of an example's sequences a reward model prefers: softmax over their rewards (Bradley-Terry for two).

    The reward is the one output of a sequence classifier with num_labels=1, as TRL's RewardTrainer trains it. A batch
    has "group" [S], the example of each sequence, and `labels` [N], the preferred one in its group: see
    `data.preference_batches`. A shift of all rewards of an example changes nothing: rewards are known up to that.

    Args:
        ranking: whether `labels` are whole rankings [N, most sequences], the best one first and -1 behind an example's
            last one: Plackett and Luce's model. `predict` then gives the probability of each to be the best.
    """

    ranking: bool = False

    def __post_init__(self) -> None:
        _check_flag("ranking", self.ranking)

    def head(self, model: nn.Module) -> Head:
        outputs = getattr(getattr(model, "config", None), "num_labels", 1)
        if outputs != 1:
            raise ValueError(f"Preference needs a reward model with one output, this one has {outputs}")
        return RewardHead(model)

    @property
    def likelihood(self) -> Likelihood:
        return PlackettLuce() if self.ranking else Categorical()


@register
@dataclass(frozen=True)
class DirectPreference(Task):
    """Which of an example's completions a policy trained by direct preference optimisation prefers.

    The reward is implicit, beta (log p(completion | prompt) - log p_reference(completion | prompt)), and preferences
    are softmax over it (Rafailov et al. 2023, "Direct preference optimization"). A batch is one of
    `data.direct_preference_batches`: as for `Options`, with "reference" [S], the log probabilities under the reference
    model, which `data.add_reference` takes from the model without its adapter.

    Args:
        beta: of the training.
        ranking: whether `labels` are whole rankings: see `Preference`.
    """

    beta: float = 0.1
    ranking: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", positive_number("beta", self.beta))
        _check_flag("ranking", self.ranking)

    def head(self, model: nn.Module) -> Head:
        return ImplicitRewardHead(model, self.beta)

    @property
    def likelihood(self) -> Likelihood:
        return PlackettLuce() if self.ranking else Categorical()


@register
@dataclass(frozen=True)
class Tokens(Task):
    """Every labelled token of a causal language model: softmax over the vocabulary at each, as in fine-tuning.

    Batches are those the adapter was trained on: `labels` [N, T] are token ids, -100 where a token is not learnt
    (prompts, pads), shifted inside as in transformers. The posterior is of the sum over labelled tokens; its curvature
    is estimated with labels drawn from the model, one backward pass a sample. With few samples variances come out too
    large, not too small. There is no evidence: the prior precision is chosen by `HeldOut`.

    What it is for: `token_uncertainty`, `generate`, `sequence_log_prob`.

    Args:
        samples: label sequences drawn for each example.
        likelihood_weight: of the data against the prior; below 1 where tokens of a text say less than as many
            independent ones would.

    Raises:
        ValueError: an argument is not positive.
    """

    samples: int = 8
    likelihood_weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", positive_integer("samples", self.samples))
        weight = positive_number("likelihood_weight", self.likelihood_weight)
        object.__setattr__(self, "likelihood_weight", weight)

    def head(self, model: nn.Module) -> Head:
        return SampledLabelsHead(model, self.samples)

    @property
    def likelihood(self) -> Likelihood:
        return SampledTokens(self.likelihood_weight)


@register
@dataclass(frozen=True)
class Outputs(Task):
    """Whatever a function makes of the model's output.

    Args:
        fn: (model output, batch) -> outputs [N, C]; differentiable, row n of example n.
        likelihood: "classification" (softmax), "regression" (Gaussian noise), or a `Likelihood`.
    """

    fn: OutputFn
    likelihood: str | Likelihood = "classification"  # type: ignore[assignment]  # a Likelihood once made

    code = ("fn",)

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"fn must be a function of (model output, batch), got {self.fn!r}")
        object.__setattr__(self, "likelihood", by_name(self.likelihood))

    def head(self, model: nn.Module) -> Head:
        return OutputHead(model, self.fn)


_TASK_OF = {
    "regression": "Regression()",
    "single_label_classification": "Classes()",
    "multi_label_classification": "MultiLabel()",
}


def _refuse_problem(model: nn.Module, task: Task, others: Sequence[str]) -> None:
    """Raises ValueError where the model says of itself that it was trained for another kind of labels."""
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem in others:
        raise ValueError(
            f"the model's config.problem_type is {problem!r}: pass {_TASK_OF[str(problem)]}, not {task!r}; or set "
            "problem_type right if it is not what the model was trained for"
        )


def _check_flag(argument: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{argument} must be True or False, got {value!r}")


def _checked_tokens(token_ids: Any) -> tuple[int | AnyOf, ...]:
    plain = not isinstance(token_ids, Sequence) or not any(isinstance(each, AnyOf) for each in token_ids)
    if plain:
        checked: tuple[int | AnyOf, ...] = _integers("token_ids", token_ids, least=2)
    else:
        checked = tuple(
            answer if isinstance(answer, AnyOf) else _integers("token_ids", [answer], least=1)[0]
            for answer in token_ids
        )
    flat = [
        token for answer in checked for token in (answer.tokens if isinstance(answer, AnyOf) else [answer])
    ]
    if len(checked) < 2:
        raise ValueError(f"token_ids must be at least two integers, got {token_ids!r}")
    if len(set(flat)) < len(flat):
        raise ValueError(f"token_ids repeats a token: {flat}")
    return checked


def _integers(argument: str, values: Any, least: int) -> tuple[int, ...]:
    listed = values.tolist() if isinstance(values, Tensor) else values
    try:
        listed = list(listed)
    except TypeError:
        listed = []
    if len(listed) < least or any(isinstance(t, bool) or not hasattr(t, "__index__") for t in listed):
        count = "at least two integers" if least > 1 else "integers"
        raise ValueError(
            f"{argument} must be {count}, got {values!r}; of an answer that several tokens spell AnyOf(tokens)"
        )
    return tuple(int(token) for token in listed)
