"""Checks arguments, and says the value, the allowed range and the name in every error."""

import contextlib
import difflib
import math
import numbers
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import Tensor

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
def complete_torch_errors(**arguments: Any) -> Iterator[None]:
    """Appends the allowed range to the messages of a constructor of torch's that got these arguments."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for start, rest in _RANGES.items():
            if message.startswith(start):
                raise ValueError(f"{message}, {rest.format(**arguments)}") from None
        raise


def _got(name: str, value: Any) -> str:
    return f"got {value!r}" if " " in name else f"got {name}={value!r}"


def check_range(
    name: str, value: float, lowest: float, highest: float = math.inf, *, above: bool = False,
    below: bool = False, finite: bool = True,
) -> float:  # fmt: skip
    """Returns a value as a float if it is in a range.

    `above` excludes `lowest` itself, `below` excludes `highest`, and `finite` infinity.

    Raises:
        TypeError: If the value is not a number.
        ValueError: If the value is NaN or not in the range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, {_got(name, value)}")
    inside = (value > lowest if above else value >= lowest) and (
        value < highest if below else value <= highest
    )
    if not inside or (finite and abs(value) == math.inf):  # Dynamo traces no math.isinf
        if highest == math.inf:
            wanted = f"{'finite and ' if finite else ''}{'>' if above else '>='} {lowest:g}"
        else:
            wanted = f"in {'(' if above else '['}{lowest:g}, {highest:g}{')' if below else ']'}"
        raise ValueError(f"{name} must be {wanted}, {_got(name, value)}")
    return float(value)


def check_rate(name: str, value: float) -> float:
    """Returns a value as a float if it is a number in [0, 1]; errors are those of `check_range`."""
    return check_range(name, value, 0, 1)


def check_int(name: str, value: int, lowest: int = 1) -> int:
    """Returns a value as an int if it is a whole number, such as 3, 3.0 or a 0-d tensor of 3, not `True`.

    Raises:
        ValueError: If the value is not a whole number, or below `lowest`.
    """
    value = value.item() if isinstance(value, Tensor) and not value.dim() else value
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or int(value) != value or value < lowest:
        raise ValueError(f"{name} must be a whole number >= {lowest}, {_got(name, value)}")
    return int(value)


def check_tensors(name: str, value: Any, example: str) -> list[Tensor]:
    """Returns the tensors that an iterable holds; raises `TypeError` for anything else."""
    tensors: list[Any] = (
        list(value) if isinstance(value, Iterable) and not isinstance(value, Tensor) else [None]
    )
    if not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError(f"{name} must hold tensors, such as {example}, got {value!r:.60}")
    return tensors


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises `ValueError` if a value is none of several choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_name(name: str) -> str:
    """Returns the name of an average; raises `TypeError` if it is no string."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name=}")
    return name


def check_flag(name: str, value: bool) -> bool:
    """Returns a value that is `True` or `False`; raises `TypeError` for others."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {name}={value!r}")
    return value


def check_known(
    start: str, names: Iterable[Any], known: Iterable[str], error: type[Exception] = ValueError
) -> None:
    """Raises an error that begins with `start` for an unknown name, with the most similar known one."""
    known = list(known)
    for name in names:
        if name not in known:
            similar = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
            hint = f"did you mean {similar[0]!r}? There" if similar else "there"
            raise error(f"{start} {name!r}; {hint} are {', '.join(known) or 'none'}")
