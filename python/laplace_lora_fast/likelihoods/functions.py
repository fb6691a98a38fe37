"""From sequences to examples: what the functions of an example are of what the model gives for its sequences.

The model gives u [S, U] for the S sequences of a batch. An example's outputs are what its likelihood is a function of:
all U numbers of its one sequence, or the one number of each sequence in its group. Its functions are all that the
likelihood sees of the outputs (contrasts of logits, say), and one Jacobian row belongs to each. As u of a sequence
depends on nothing else, one backward pass serves all sequences at once, and rows of functions are sums of theirs.

Examples with the same number of outputs are one block; nothing is padded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_lora_fast.devices import to_device


class Functions(ABC):
    """The functions of one batch's examples.

    Attributes:
        one_sequence: whether each example is one sequence.
        examples: for each block the indices [N_b] of its examples in the batch.
        n_examples: N.
    """

    one_sequence: bool
    examples: list[Tensor]
    n_examples: int

    @property
    @abstractmethod
    def sizes(self) -> list[int]:
        """K_b of every block."""

    @abstractmethod
    def outputs(self, u: Tensor) -> list[Tensor]:
        """Outputs [N_b, C_b] of every block from u [S, U]."""

    @abstractmethod
    def values(self, u: Tensor) -> list[Tensor]:
        """The functions [N_b, K_b] of every block from u [S, U]."""

    @abstractmethod
    def spread(self, cotangents: Sequence[Tensor]) -> Tensor:
        """Cotangents [S, U, P] of u from those of every block's outputs [N_b, C_b, P_b]; missing passes are zero."""

    @abstractmethod
    def plain(self, u: Tensor) -> Tensor:
        """Cotangents [S, U, P] of the backward passes whose rows `combine` takes."""

    @abstractmethod
    def combine(self, passes: Sequence[Tensor]) -> list[Tensor]:
        """Rows [N_b, K_b, ..] of every block's functions from those of the `plain` passes, [S, ..] each."""

    @abstractmethod
    def by_example(self, rows: Tensor) -> Tensor:
        """Rows [S, ..] of one pass with `spread` cotangents, summed over the sequences of each example: [N, ..]."""


class OneSequence(Functions):
    """An example is a sequence: its functions are u L.

    Args:
        n: number of examples.
        directions: L [U, K].
    """

    def __init__(self, n: int, directions: Tensor) -> None:
        self.one_sequence, self.n_examples, self._directions = True, n, directions
        self.examples = [torch.arange(n)]

    @property
    def sizes(self) -> list[int]:
        return [self._directions.shape[1]]

    def outputs(self, u: Tensor) -> list[Tensor]:
        return [u]

    def values(self, u: Tensor) -> list[Tensor]:
        return [u @ self._directions.to(u)]

    def spread(self, cotangents: Sequence[Tensor]) -> Tensor:
        return cotangents[0]

    def plain(self, u: Tensor) -> Tensor:
        return self._directions.to(u).expand(len(u), -1, -1)

    def combine(self, passes: Sequence[Tensor]) -> list[Tensor]:
        return [passes[0][:, None] if len(passes) == 1 else torch.stack(list(passes), 1)]

    def by_example(self, rows: Tensor) -> Tensor:
        return rows


class Group(Functions):
    """An example is a group of sequences with one number each; its functions are combinations of those.

    Args:
        group: [S] the example of every sequence, each of 0 .. N - 1 at least once, in any order; on the CPU.
        directions: makes L [C, K] for an example of C sequences.
        device: of u.
    """

    def __init__(self, group: Tensor, directions: dict[int, Tensor], device: torch.device) -> None:
        counts = torch.bincount(group)
        order = torch.argsort(group, stable=True)
        starts = counts.cumsum(0) - counts
        self.one_sequence, self.n_examples, self._group = False, len(counts), to_device(group, device)
        self.examples, self._members, self._directions = [], [], []
        for size in counts.unique().tolist():
            examples = (counts == size).nonzero().flatten()
            self.examples.append(examples)
            members = order[starts[examples][:, None] + torch.arange(size)]
            self._members.append(to_device(members, device))
            self._directions.append(directions[size])

    @property
    def sizes(self) -> list[int]:
        return [each.shape[1] for each in self._directions]

    def outputs(self, u: Tensor) -> list[Tensor]:
        return [u[:, 0][members] for members in self._members]

    def values(self, u: Tensor) -> list[Tensor]:
        blocks = zip(self.outputs(u), self._directions, strict=True)
        return [outputs @ directions.to(u) for outputs, directions in blocks]

    def spread(self, cotangents: Sequence[Tensor]) -> Tensor:
        passes = max(each.shape[2] for each in cotangents)
        spread = cotangents[0].new_zeros(len(self._group), 1, passes)
        for members, each in zip(self._members, cotangents, strict=True):
            spread[members, 0, : each.shape[2]] = each
        return spread

    def plain(self, u: Tensor) -> Tensor:
        return u.new_ones(len(u), 1, 1)

    def combine(self, passes: Sequence[Tensor]) -> list[Tensor]:
        (rows,) = passes
        return [
            torch.einsum("nc...,ck->nk...", rows[members], directions.to(rows))
            for members, directions in zip(self._members, self._directions, strict=True)
        ]

    def by_example(self, rows: Tensor) -> Tensor:
        return rows.new_zeros(self.n_examples, *rows.shape[1:]).index_add_(0, self._group, rows)
