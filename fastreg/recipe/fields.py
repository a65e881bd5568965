"""Sections of settings: how what a user gives is read, and what is said of what cannot be."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Read = Callable[[str, Any], Any]
"""Makes a value of what was given under a name, or raises ValueError."""


@dataclass(frozen=True)
class Key:
    """One setting of a section."""

    read: Read
    example: Any
    text: str


@dataclass(frozen=True)
class Section:
    """One regularizer, as a recipe has it: on, with settings, or off.

    Args:
        text: What it does.
        keys: Its settings.
        short: The setting that a bare value stands for.
        many: Whether a list of such is possible.
    """

    text: str
    keys: dict[str, Key]
    short: str
    many: bool = False

    def read(self, name: str, value: Any) -> dict[str, Any] | list[dict[str, Any]] | None:
        """The settings in their own types; `None` where it is off.

        Args:
            name: For errors.
            value: Settings by name; a bare value for the most important one; `True` for the defaults;
                `None` or `False` for off; a list of such where several are possible.

        Raises:
            ValueError: For unknown settings and values that cannot be read.
        """
        if value is None or value is False:
            return None
        if value is True:
            return {}
        if isinstance(value, Mapping):
            known = {key: self._known(name, key) for key in value}
            return {
                key: known[key].read(f"{name}.{key}", item) for key, item in value.items() if item is not None
            }
        if self.many and isinstance(value, Sequence) and any(isinstance(item, Mapping) for item in value):
            return [self._one(f"{name}[{i}]", item) for i, item in enumerate(value)]
        return {self.short: self.keys[self.short].read(name, value)}

    def _one(self, name: str, value: Any) -> dict[str, Any]:
        """A section of several, which is on."""
        read = self.read(name, value)
        if not isinstance(read, dict):
            raise ValueError(f"{name} must be settings, or true for defaults, got {value!r}: leave it out")
        return read

    def _known(self, name: str, key: Any) -> Key:
        if key not in self.keys:
            raise ValueError(unknown(f"{name}: unknown setting", key, self.keys))
        return self.keys[key]


def unknown(start: str, name: Any, known: Iterable[str]) -> str:
    """A message about a name that there is not, with the most similar one that there is."""
    known = list(known)
    similar = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    return f"{start} {name!r}; " + (f"did you mean {similar[0]!r}? " if similar else "") + (
        f"There are {', '.join(known)}" if known else "There are none"
    )  # fmt: skip


def number(name: str, value: Any) -> float:
    """A float; YAML takes 1e-3 for text."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise ValueError(f"{name} must be a number, got {value!r}")


def whole(name: str, value: Any) -> int:
    """An integer."""
    given = number(name, value)
    if given != given or given in (float("inf"), float("-inf")) or int(given) != given:
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(given)


def duration(name: str, value: Any) -> int | float:
    """Steps as an integer, or a share of the run as a float up to 1."""
    given = number(name, value)
    share = isinstance(value, float) or (isinstance(value, str) and not value.strip().lstrip("+-").isdigit())
    if share and 0 <= given <= 1:
        return given
    if not 0 <= given < float("inf") or int(given) != given:
        raise ValueError(
            f"{name} must be a whole number of steps, or a share of the run from 0.0 to 1.0, got {value!r}"
        )
    return int(given)


def flag(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def text(name: str, value: Any) -> str:
    """A name."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {value!r}")
    return value


def one_of(*choices: Any) -> Read:
    """One of these."""

    def read(name: str, value: Any) -> Any:
        for choice in choices:
            if value == choice and isinstance(value, bool) == isinstance(choice, bool):
                return choice
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")

    return read


def numbers(name: str, value: Any) -> list[float]:
    """A list of numbers."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{name} must be a list of numbers, got {value!r}")
    return [number(f"{name}[{i}]", item) for i, item in enumerate(value)]


def pair(name: str, value: Any) -> list[float]:
    """Two numbers."""
    if len(given := numbers(name, value)) != 2:
        raise ValueError(f"{name} must be two numbers, got {value!r}")
    return given


def ids(name: str, value: Any) -> list[int]:
    """A list of whole numbers."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{name} must be a list of whole numbers, got {value!r}")
    return [whole(f"{name}[{i}]", item) for i, item in enumerate(value)]


def names(name: str, value: Any) -> list[str]:
    """A list of names, or one."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, Sequence) or not given:
        raise ValueError(f"{name} must be a name or a list of names, got {value!r}")
    return [text(f"{name}[{i}]", item) for i, item in enumerate(given)]


def either(*reads: Read) -> Read:
    """The first that can read it, or the complaints of all."""

    def read(name: str, value: Any) -> Any:
        complaints = []
        for attempt in reads:
            try:
                return attempt(name, value)
            except ValueError as error:
                complaints.append(str(error))
        raise ValueError("; or ".join(complaints))

    return read
