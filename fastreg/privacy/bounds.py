"""Reads `max_grad_norm`: one bound for all parameters together, or one for each parameter."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.validation import check_range

Bound = float | Tensor
CLIPPING = ("flat", "per_layer")


def clipping_bounds(
    max_grad_norm: Any, clipping: str, count: int, names: Sequence[str] | None = None
) -> list[Bound]:
    """Returns one bound for flat clipping, or one for each parameter for per-layer clipping.

    Args:
        max_grad_norm: One number, which per-layer clipping divides by the root of `count`; or one number for
            each parameter, in order or by name.
        clipping: `"flat"` or `"per_layer"`.
        count: Number of parameters.
        names: Names of the parameters; `None` refuses bounds by name.

    Raises:
        TypeError: If a bound is not a number.
        ValueError: For a wrong number of bounds, and for bounds that are not > 0 (tensors are not read).
    """
    if isinstance(max_grad_norm, Mapping):
        if missing := [name for name in names or () if name not in max_grad_norm]:
            raise ValueError(f"max_grad_norm has no bound for parameter {missing[0]!r}")
        bounds = [max_grad_norm[name] for name in names or ()]
    elif isinstance(max_grad_norm, Sequence):
        bounds = list(max_grad_norm)
    else:
        shares = count if clipping == "per_layer" else 1
        bounds = [max_grad_norm / math.sqrt(shares) if shares > 1 else max_grad_norm] * shares
    if len(bounds) != (count if clipping == "per_layer" else 1):
        raise ValueError(
            f"max_grad_norm must be one number{'' if clipping == 'flat' else f' or {count}'} with "
            f"clipping={clipping!r}, got {len(bounds)}: {max_grad_norm!r}"
        )
    for bound in bounds:
        if not isinstance(bound, Tensor):
            check_range("max_grad_norm", bound, 0, above=True, finite=False)
    return bounds


def sensitivity_of(bounds: Sequence[Bound]) -> Bound:
    """Returns √(Σ C²), by which one sample changes all clipped sums together at most."""
    if len(bounds) == 1:
        return bounds[0]
    if any(isinstance(bound, Tensor) for bound in bounds):
        return torch.stack([torch.as_tensor(bound).double() for bound in bounds]).norm()
    return math.hypot(*bounds)
