"""Reports errors of the user's input in one line, with the value and the fix."""

import argparse
import contextlib
import math
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch


class UsageError(Exception):
    """An input that cannot be used; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Parser(argparse.ArgumentParser):
    """An argument parser that keeps line breaks, and raises `UsageError` instead of printing the usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Raises a `UsageError` with a pointer to the help."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def _reader(kind: Callable[[str], float], lowest: int, above: bool = False) -> Callable[[str], Any]:
    """Returns a function for `add_argument(type=...)` that reads a finite number in a range."""

    def read(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if (value > lowest if above else value >= lowest) and value < math.inf:
                return value
        wanted = f"a {'whole ' if kind is int else ''}number {'>' if above else '>='} {lowest}"
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")

    return read


count, whole = _reader(int, 1), _reader(int, 0)
positive, non_negative = _reader(float, 0, above=True), _reader(float, 0)


def require(command: str, extra: str, *packages: str) -> None:
    """Refuses to run a subcommand without the packages of its extra."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise UsageError(f"fastreg {command} needs {', '.join(missing)}: pip install 'fastreg[{extra}]'")


def device(name: str | None) -> torch.device:
    """Returns a device by name after trying it; by default a GPU if there is one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from None


def folder(name: str | None, command: str) -> Path:
    """Makes and returns the folder for results; by default it is named after command and time."""
    out = Path(name if name is not None else time.strftime(f"runs/{command}-%Y%m%d-%H%M%S"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from None
    return out
