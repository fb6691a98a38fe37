"""Which layers are fed by one tensor (q, k and v; gate and up): their input is observed once.

A layer may run several times in a forward pass (shared layers, as ALBERT's): its inputs are then one stream, and layers
share it that have the same tensors in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from weakref import ref

from torch import Tensor

from laplace_lora_fast.errors import InvalidBatchError, UnsupportedAdapterError


class SharedInputs:
    """Recognises inputs by identity within one forward pass.

    Args:
        layers: names of the layers.
        groups: as for `Tap`.
        varying: layers that may run as often as they like in each pass.

    Attributes:
        groups: for each layer the index of the first with the same inputs; None before the first pass has ended.
        uses: of every layer that has run in this pass, how often.
    """

    def __init__(self, layers: Sequence[str], groups: list[int] | None, varying: Sequence[int] = ()) -> None:
        self._layers, self.groups, self._varying = layers, groups, set(varying)
        self._expected: dict[int, int] | None = None  # uses of the first pass
        self.start()

    def expected(self, index: int) -> int | None:
        """How often a layer ran in the first pass; None where that is not known, or may vary."""
        if self._expected is None or index in self._varying:
            return None
        return self._expected.get(index, 1)

    def fed_by(self, index: int) -> list[int]:
        """The layers that are known to share their input with `index`, itself among them."""
        leaders = range(len(self._layers)) if self.groups is None else self.groups
        return [other for other, leader in enumerate(leaders) if leader == index]

    def start(self) -> None:
        """Before a forward pass."""
        self.uses: dict[int, int] = {}
        self._inputs: dict[int, list[int]] = {}  # of every layer, which tensors
        self._numbers: dict[int, tuple[ref[Tensor], int]] = {}  # id of an input -> the input and its number
        self._count = count()
        self._kept: list[tuple[ref[Tensor], int, int]] = []  # what was observed, its layer and version

    def enter(self, index: int, x: Tensor) -> int:
        """Takes note that a layer runs with input x.

        Returns:
            How often it has run before in this pass.

        Raises:
            InvalidBatchError: it shared its input in an earlier pass, or ran less often, and does not now.
        """
        known = self._numbers.get(id(x))
        if known is None or known[0]() is not x:  # an id is another's once its tensor is gone
            known = self._numbers[id(x)] = ref(x), next(self._count)
        number = known[1]
        inputs = self._inputs.setdefault(index, [])
        use = len(inputs)
        inputs.append(number)
        self.uses[index] = use + 1
        known_uses = {} if self._expected is None or index in self._varying else self._expected
        expected = known_uses.get(index)
        if expected is not None and use >= expected:
            raise InvalidBatchError(
                f"layer {self._layers[index]!r} runs more often than in the first batch ({expected} times): pass "
                "batches in which it runs as often"
            )
        if self.groups is not None and self.groups[index] != index:
            leaders = self._inputs.get(self.groups[index], ())
            if use >= len(leaders) or leaders[use] != number:
                raise InvalidBatchError(
                    f"layer {self._layers[index]!r} no longer shares its input with the layers it did before"
                )
        return use

    def count(self, index: int) -> None:
        """Takes note that a layer runs whose input is not observed: it shares it with none, and may run at will."""
        self.uses[index] = self.uses.get(index, 0) + 1

    def keep(self, index: int, x: Tensor) -> None:
        """An observer may keep x until the backward passes are over."""
        self._kept.append((ref(x), index, x._version))

    def finish(self) -> None:
        """After a forward pass. Raises UnsupportedAdapterError if an input was changed in place since it was kept."""
        for kept, index, version in self._kept:
            x = kept()
            if x is not None and x._version != version:
                raise UnsupportedAdapterError(
                    f"the input of layer {self._layers[index]!r} is changed in place after the layer ran: leave the "
                    "layer out with `layers`"
                )
        if self.groups is None:
            first: dict[tuple[int, ...], int] = {}
            groups = list(range(len(self._layers)))
            for index, inputs in self._inputs.items():  # in the order in which they ran
                groups[index] = first.setdefault(tuple(inputs), index)
            self.groups = groups
        if self._expected is None:
            self._expected = dict(self.uses)
