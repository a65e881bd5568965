"""Ranges of arguments: what was given, and what may be; torch's messages completed by that."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

_RANGES = {
    "Invalid learning rate": "must be >= 0",
    "Invalid epsilon value": "must be >= 0",
    "Invalid beta parameter": "must be in [0, 1)",
    "Invalid weight_decay value": "must be >= 0",
    "Invalid momentum value": "must be >= 0",
    "Tensor lr must be": "got lr={lr}",
    "Tensor betas": "got betas={betas}",
    "betas must be either": "got betas={betas}",
    "Nesterov momentum requires": "got momentum={momentum}, dampening={dampening}",
}


@contextlib.contextmanager
def told(**given: Any) -> Iterator[None]:
    """Complete the messages of torch's constructor; they start as they do there.

    Args:
        given: The arguments of the constructor.
    """
    try:
        yield
    except ValueError as error:
        message = str(error)
        for start, one_minus_beta in _RANGES.items():
            if message.startswith(start):
                raise ValueError(f"{message}, {one_minus_beta.format(**given)}") from None
        raise


def checked(name: str, value: float, lowest: float, *, above: bool = False, finite: bool = True) -> float:
    """The value as a float.

    Raises:
        ValueError: If it is below `lowest` (or not `above` it), infinite where it must be `finite`, or NaN.
    """
    if not (value > lowest if above else value >= lowest) or (finite and value == math.inf):
        wanted = f"{'finite and ' if finite else ''}{'>' if above else '>='} {lowest:g}"
        raise ValueError(f"{name} must be {wanted}, got {name}={value!r}")
    return float(value)


def counted(name: str, value: int, lowest: int) -> int:
    """The value, a whole number.

    Raises:
        ValueError: If it is none, or below `lowest`.
    """
    if isinstance(value, bool) or int(value) != value or value < lowest:
        raise ValueError(f"{name} must be a whole number >= {lowest}, got {name}={value!r}")
    return int(value)
