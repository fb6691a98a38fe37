"""Options as objects: frozen dataclasses whose repr is their constructor call, with a JSON form for files.

Tasks, structures, likelihoods and ways of tuning are such objects. Each stands where its implementation does; here is
what they have in common: the register of their names, the JSON form, and checks of single values.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import wraps
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")

DEFAULT_BUDGET = 4 * 2**30  # bytes

_KINDS: dict[str, type[Any]] = {}


def register(kind: type[T]) -> type[T]:
    """Class decorator: lets files and strings name this option.

    A string is short for the option with all its defaults: "kfac" for `KFAC()`.
    """
    _KINDS[kind.__name__] = kind
    return kind


def kinds(base: type[T]) -> list[type[T]]:
    """The registered options that derive from `base`, in the order of their registration."""
    return [kind for kind in _KINDS.values() if issubclass(kind, base)]


def named(argument: str, value: Any, base: type[T]) -> T:
    """An option from what a user passes: itself, or its short name.

    Raises:
        ValueError: a string that is no option of this kind, or one whose option needs arguments.
        TypeError: another kind of object.
    """
    if isinstance(value, base):
        return value
    choices = {short_name(kind): kind for kind in kinds(base)}
    if not isinstance(value, str):
        expected = ", ".join(kind.__name__ + "(..)" for kind in choices.values())
        raise TypeError(f"{argument} must be one of {expected}, got {value!r}")
    if value not in choices:
        raise ValueError(f"{argument} must be one of {sorted(choices)}, got {value!r}")
    try:
        return choices[value]()
    except TypeError as error:
        raise ValueError(
            f"{argument}={value!r} needs arguments: pass {choices[value].__name__}(..)"
        ) from error


def says_arguments(init: Callable[P, None]) -> Callable[P, None]:
    """Decorator of an `__init__`: what is wrong with its arguments is said in the name of the class that is made."""
    expected = inspect.signature(init)
    names = list(expected.parameters)[1:]

    @wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        kind = type(args[0]).__name__
        unknown = [name for name in kwargs if name not in names]
        if unknown:
            near = get_close_matches(unknown[0], names, 1)
            meant = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(names)}"
            raise TypeError(f"{kind} has no argument {unknown[0]!r}: {meant}")
        try:
            expected.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{kind}: {error}; it takes {', '.join(names)}") from None
        init(*args, **kwargs)

    return checked


def short_name(kind: type[Any]) -> str:
    """The name as a string: "leave_one_out" for LeaveOneOut, "kfac" for KFAC."""
    name = kind.__name__
    if name.isupper():
        return name.lower()
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def to_json(option: Any, without: Sequence[str] = ()) -> Any:
    """JSON of an option: {"Rows": {"columns": 128, ..}}; plain values are themselves.

    Args:
        option: the option.
        without: fields to leave out.

    Raises:
        TypeError: a value has no JSON form; names its field.
    """
    if type(option) in _KINDS.values():
        values = {}
        for field in fields(option):
            if field.name in without:
                continue
            try:
                values[field.name] = to_json(getattr(option, field.name))
            except TypeError as error:
                raise TypeError(f"{type(option).__name__}.{field.name} cannot be saved: {error}") from error
        return {type(option).__name__: values}
    if isinstance(option, tuple | list):
        return [to_json(value) for value in option]
    if option is None or isinstance(option, bool | int | float | str):
        return option
    raise TypeError(f"{type(option).__name__} has no JSON form")


def from_json(data: Any) -> Any:
    """The option that `to_json` made this of.

    Raises:
        ValueError: no option of this name is registered, or its values are not valid.
    """
    if isinstance(data, dict):
        if len(data) != 1 or not isinstance(next(iter(data.values())), dict):
            raise ValueError(f"not the JSON form of an option: {data!r}")
        ((name, values),) = data.items()
        if name not in _KINDS:
            raise ValueError(f"no option {name!r} is registered: import the package that defines it first")
        try:
            return _KINDS[name](**{key: from_json(value) for key, value in values.items()})
        except TypeError as error:
            raise ValueError(f"option {name} does not fit: {error}") from error
    if isinstance(data, list):
        return tuple(from_json(value) for value in data)
    return data


def check_choice(argument: str, value: Any, choices: Sequence[str]) -> str:
    """Raises ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{argument} must be one of {list(choices)}, got {value!r}")
    return value


def integer(argument: str, value: Any) -> int:
    """`value` as a Python int, which is what can be saved. Raises ValueError for anything but a whole number."""
    try:
        return int(value) if isinstance(value, float) and value.is_integer() else operator.index(value)
    except TypeError as error:
        raise ValueError(f"{argument} must be an integer, got {value!r}") from error


def positive_integer(argument: str, value: Any) -> int:
    """`integer`, at least 1."""
    number = integer(argument, value)
    if number < 1:
        raise ValueError(f"{argument} must be at least 1, got {number}")
    return number


def positive_number(argument: str, value: Any) -> float:
    """`value` as a Python float. Raises ValueError unless it is positive and finite."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{argument} must be a number, got {value!r}") from error
    if isinstance(value, str) or not 0 < number < math.inf:
        raise ValueError(f"{argument} must be positive and finite, got {value!r}")
    return number
