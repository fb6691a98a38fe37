"""What stands at the pads of a stream, as far as someone has looked at it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PadImage(NamedTuple):
    """What a listener has made of the pads of a stream, where it has read them anyway.

    Attributes:
        images: of n streams alike, zero where the stream is zero: [n, S, k] of a sequence's pads together, or
            [n, S, T, k] of every token, pads or not.
        place: of the stream among them.
    """

    images: Tensor
    place: int
