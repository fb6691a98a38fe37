"""What an op is: a schema, checks, the shape of its results, and its definition in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def _no_result(*args: Any) -> None:
    return None


@dataclass(eq=False)
class Op:
    """One op: everything about it but the kernels of the backends.

    All functions take the arguments of the schema, by position.

    Attributes:
        schema: As torch writes it, `name(Tensor(a!) C, Tensor X, float alpha) -> ()`. A `!` marks what is changed.
        probe: The argument whose device and dtype decide who serves a call; of a list the first member.
        check: Raises for the first argument that does not fit, and names it.
        reference: The definition, in plain PyTorch; it serves where no backend does.
        fake: Results of the right shape and dtype, not computed; not needed where there are none.
        tags: For `torch.library`, beside `pt2_compliant_tag`.
        name: Of the op, from the schema.
        arguments: Their names, from the schema.
        written: Whether each is changed, from the schema.
        writes: Whether any is.
    """

    schema: str
    probe: str
    check: Callable[..., None]
    reference: Callable[..., Any]
    fake: Callable[..., Any] = _no_result
    tags: tuple[torch.Tag, ...] = ()
    name: str = field(init=False)
    arguments: tuple[str, ...] = field(init=False)
    written: tuple[bool, ...] = field(init=False)
    writes: bool = field(init=False)

    def __post_init__(self) -> None:
        parsed = torch._C.parse_schema(self.schema)
        self.name = parsed.name
        self.arguments = tuple(argument.name for argument in parsed.arguments)
        self.written = tuple(
            argument.alias_info is not None and argument.alias_info.is_write for argument in parsed.arguments
        )
        self.writes = any(self.written)
        self._probed = self.arguments.index(self.probe)

    def probed(self, args: Sequence[Any]) -> Tensor:
        """The tensor whose device and dtype decide who serves a call."""
        probe = args[self._probed]
        found: Tensor = probe if isinstance(probe, Tensor) else probe[0]
        return found

    def tensors(self, args: Sequence[Any]) -> Iterator[tuple[str, Tensor, bool]]:
        """Name, tensor, and whether it is changed, of every tensor among the arguments."""
        for name, arg, written in zip(self.arguments, args, self.written, strict=True):
            if isinstance(arg, Tensor):
                yield name, arg, written
            elif isinstance(arg, list):
                for i, member in enumerate(arg):
                    if isinstance(member, Tensor):
                        yield f"{name}[{i}]", member, written
