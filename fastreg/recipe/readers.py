"""Readers of YAML values: each makes a value of one type, or says what is wrong with it."""

import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, NewType

import torch

from ..common.validation import check_int

Reader = Callable[[str, Any], Any]
"""Makes a value of what was set under a name, or raises ValueError."""

Duration = NewType("Duration", float)
"""Steps as an integer, or a share of the run as a float up to 1."""


class SettingError(ValueError):
    """An error that begins with the name of the setting that it is about."""


def check_setting(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function with the value of a setting; its `ValueError` becomes a `SettingError`."""
    try:
        return function(*args)
    except ValueError as error:
        raise SettingError(f"{name}: {error}") from None


def reader_of(annotation: Any) -> Reader | None:
    """Returns the reader of an annotated type; `None` for types that YAML cannot hold."""
    if annotation in _READERS:
        return _READERS[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return one_of(*arguments)
    readers = [reader for reader in map(reader_of, arguments) if reader is not None]
    if origin in (typing.Union, types.UnionType) and readers:
        return either(*readers)
    if isinstance(origin, type) and issubclass(origin, Sequence) and readers:
        return sequence_of(readers[0], 2 if origin is tuple and arguments[-1] is not ... else None)
    return None


def number(name: str, value: Any) -> float:
    """Returns a float, also from text, since YAML takes 1e-3 for text."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise ValueError(f"{name} must be a number, got {value!r}")


def whole(name: str, value: Any) -> int:
    """Returns an integer that is not negative, also from text."""
    read = number(name, value)
    if read % 1:
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return check_int(name, read, 0)  # type: ignore[arg-type]


def duration(name: str, value: Any) -> int | float:
    """Returns steps as an integer, or a share of the run as a float up to 1."""
    amount = number(name, value)
    is_share = isinstance(value, float) or (
        isinstance(value, str) and not value.strip().lstrip("+-").isdigit()
    )
    if is_share and 0 <= amount <= 1:
        return amount
    if not 0 <= amount < float("inf") or int(amount) != amount:
        raise ValueError(
            f"{name} must be a whole number of steps, or a share of the run from 0.0 to 1.0, got {value!r}"
        )
    return int(amount)


def flag(name: str, value: Any) -> bool:
    """Returns true or false, and nothing that merely counts as one of them."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def text(name: str, value: Any) -> str:
    """Returns text, also from true and false, since YAML takes these for flags."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {value!r}")
    return value


def one_of(*choices: Any) -> Reader:
    """Returns a reader that accepts some choices only."""

    def read(name: str, value: Any) -> Any:
        for choice in choices:
            if value == choice and isinstance(value, bool) == isinstance(choice, bool):
                return choice
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")

    return read


def sequence_of(read_item: Reader, length: int | None = None) -> Reader:
    """Returns a reader of lists of some length, any by default, whose items another reader reads."""

    def read(name: str, value: Any) -> list[Any]:
        if isinstance(value, str) or not isinstance(value, Sequence) or length not in (None, len(value)):
            raise ValueError(f"{name} must be a list{f' of {length}' if length else ''}, got {value!r}")
        return [read_item(f"{name}[{i}]", item) for i, item in enumerate(value)]

    return read


def either(*readers: Reader) -> Reader:
    """Returns a reader that tries several in turn, and raises the complaints of all."""

    def read(name: str, value: Any) -> Any:
        complaints = []
        for attempt in readers:
            try:
                return attempt(name, value)
            except ValueError as error:
                complaints.append(str(error))
        raise ValueError("; or ".join(complaints))

    return readers[0] if len(readers) == 1 else read


_READERS: dict[Any, Reader] = {
    bool: flag, int: whole, float: number, str: text, Duration: duration,
    torch.dtype: one_of("float32", "bfloat16", "float16"),
}  # fmt: skip
