"""What stands at the pads of a stream, as far as someone has looked at it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PadImage(NamedTuple):
    """What a listener has made of the pads of a stream, where it has read them anyway.

    Attributes:
        images: [n, S, k] of n streams alike, sequence by sequence; zero where the stream is zero at its pads.
        place: of the stream among them.
    """

    images: Tensor
    place: int
