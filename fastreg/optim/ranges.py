"""torch's messages about constructor arguments, completed: what was given, and what may be."""

from __future__ import annotations

import contextlib
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
        for start, rest in _RANGES.items():
            if message.startswith(start):
                raise ValueError(f"{message}, {rest.format(**given)}") from None
        raise
