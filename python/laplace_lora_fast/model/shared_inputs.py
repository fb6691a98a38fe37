"""Which layers are fed by one tensor (q, k and v; gate and up): their input is observed once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from laplace_lora_fast.errors import InvalidBatchError, UnsupportedAdapterError


class SharedInputs:
    """Recognises inputs by identity within one forward pass.

    Args:
        layers: names of the layers.
        groups: as for `Tap`.

    Attributes:
        groups: for each layer the index of the first with the same input; None before the first pass has ended.
        leaders: the same of the layers that have run in this pass.
    """

    def __init__(self, layers: Sequence[str], groups: list[int] | None) -> None:
        self._layers, self.groups = layers, groups
        self.start()

    def start(self) -> None:
        """Before a forward pass."""
        self.leaders: dict[int, int] = {}
        self._first = WeakIdKeyDictionary()  # an input -> its first layer
        self._kept = WeakIdKeyDictionary()  # what was observed -> its layer and version

    def leads(self, index: int, x: Tensor) -> bool:
        """Whether the layer is the one at which its input x is observed.

        Raises:
            InvalidBatchError: it shared its input in an earlier pass, and does not now.
            UnsupportedAdapterError: it has run before.
        """
        layer = self._layers[index]
        if index in self.leaders:
            raise UnsupportedAdapterError(
                f"layer {layer!r} ran twice in one forward pass: exclude shared layers"
            )
        leader: int = self._first.setdefault(x, index)
        if self.groups is not None and leader != self.groups[index]:
            if self.groups[index] != index:
                raise InvalidBatchError(
                    f"layer {layer!r} no longer shares its input with the layers it did before"
                )
            leader = index  # shared now, apart in the first batch: it has its own factor
        self.leaders[index] = leader
        return leader == index

    def keep(self, index: int, x: Tensor) -> None:
        """An observer may keep x until the backward passes are over."""
        self._kept[x] = index, x._version

    def finish(self) -> None:
        """After a forward pass. Raises UnsupportedAdapterError if an input was changed in place since it was kept."""
        for x, (index, version) in self._kept.items():
            if x._version != version:
                raise UnsupportedAdapterError(
                    f"the input of layer {self._layers[index]!r} is changed in place after the layer ran: exclude the "
                    "layer in LoraConfig"
                )
        if self.groups is None:
            self.groups = [self.leaders.get(index, index) for index in range(len(self._layers))]
