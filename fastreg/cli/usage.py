"""Errors of the user's input: one line that shows the value and the fix."""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    import torch

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


def require(command: str, extra: str, *packages: str) -> None:
    """Refuse to run a subcommand without the packages of its extra."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise UsageError(f"fastreg {command} needs {', '.join(missing)}: pip install 'fastreg[{extra}]'")


def device(name: str | None) -> torch.device:
    """The device of this name, tried; a GPU if there is one by default."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from None


def folder(name: str | None, command: str) -> Path:
    """The folder for the results of a run, made; named after command and time by default."""
    out = Path(name if name is not None else time.strftime(f"runs/{command}-%Y%m%d-%H%M%S"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from None
    return out
