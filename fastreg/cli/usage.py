"""Errors of the user's input: one line that shows the value and the fix."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable
from typing import NoReturn, TypeVar

T = TypeVar("T")


class UsageError(Exception):
    """Something the user gave cannot be used; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UsageError` where argparse would print the whole usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Raise with a pointer to the help."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def count(text: str) -> int:
    """An integer ≥ 1, for `add_argument(type=...)`."""
    return _number(text, int, lambda value: value >= 1, "a whole number >= 1")


def whole(text: str) -> int:
    """An integer ≥ 0."""
    return _number(text, int, lambda value: value >= 0, "a whole number >= 0")


def positive(text: str) -> float:
    """A finite float > 0."""
    return _number(text, float, lambda value: 0 < value < math.inf, "a number > 0")


def non_negative(text: str) -> float:
    """A finite float ≥ 0."""
    return _number(text, float, lambda value: 0 <= value < math.inf, "a number >= 0")


def _number(text: str, kind: Callable[[str], T], accepts: Callable[[T], bool], wanted: str) -> T:
    with contextlib.suppress(ValueError):
        if accepts(value := kind(text)):
            return value
    raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
