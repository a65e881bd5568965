"""What is added to a loss: penalties on the weights, and R-Drop's agreement of two passes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.layout import Shards, is_dtensor, shards
from ..ops.penalty import sum_of_powers

Parameters = nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


def l2_penalty(params: Parameters, strength: float | Tensor = 1.0) -> Tensor:
    """strength · Σ p² over all elements of all tensors, without ½: `sum(p.pow(2).sum() for p in params)`.

    ```python
    loss = F.cross_entropy(model(x), y) + fastreg.l2_penalty(model, 1e-4)
    ```

    One launch reads everything, one writes all gradients 2gp, whatever the number of tensors; g stays on the
    device.  Sums are taken in float64 in a fixed order.  Derivatives of any order, `torch.func` and
    `torch.compile` work, forward mode does not.  Weight decay in an optimizer costs no pass at all: this is
    for what must be part of the loss.

    Args:
        params: A model, of which the parameters that require gradients count, without its frozen ones; or
            tensors or named tensors, of which all count as often as they are listed.  Any real or complex
            floating dtypes and devices; of DTensors, sharded or replicated, the whole counts on every rank.
        strength: Factor, ≥ 0; a 0-d tensor, which is not checked, stays on its device and may learn.

    Returns:
        0-d, on the device of the first tensor; float32, or float64 where a tensor is.

    Raises:
        TypeError: For what is no floating-point tensor.
        ValueError: If there are no parameters, for a negative strength, and for DTensors of partial sums.

    Reference:
        Krogh & Hertz 1991, "A simple weight decay can improve generalization".
    """
    given = _listed(params, "l2_penalty()")
    tensors = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in given]
    return _scaled(tensors, False, strength)


def l1_penalty(params: Parameters, strength: float | Tensor = 1.0) -> Tensor:
    """strength · Σ |p| over all elements of all tensors: `sum(p.abs().sum() for p in params)`.

    As `l2_penalty` in everything else; the gradient g · sign(p) is 0 where p is.

    Args:
        params: See `l2_penalty`; no complex ones.
        strength: See `l2_penalty`.

    Returns:
        0-d, on the device of the first tensor; float32, or float64 where a tensor is.

    Raises:
        TypeError: For what is no floating-point tensor, and for complex ones.
        ValueError: If there are no parameters, for a negative strength, and for DTensors of partial sums.

    Reference:
        Tibshirani 1996, "Regression shrinkage and selection via the lasso".
    """
    tensors = list(_listed(params, "l1_penalty()"))
    if complex_ones := [t for t in tensors if t.is_complex()]:
        raise TypeError(f"l1_penalty() takes real tensors, got {complex_ones[0].dtype}; give it p.abs()")
    return _scaled(tensors, True, strength)


def _listed(params: Any, name: str) -> Iterator[Tensor]:
    if isinstance(params, nn.Module):
        found: Iterable[Any] = [p for p in params.parameters() if p.requires_grad]
    elif isinstance(params, Tensor):
        found = [params]
    elif isinstance(params, Mapping) or not isinstance(params, Iterable):
        raise TypeError(f"{name} takes a model, tensors or named tensors, got {type(params).__name__}")
    else:
        found = params
    empty = True
    for each in found:
        tensor = each[1] if isinstance(each, tuple) and len(each) == 2 else each
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} takes tensors or (name, tensor) pairs, got {type(each).__name__}")
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.dtype.itemsize < 2:
            raise TypeError(f"{name} takes float16, bfloat16, float32 and float64, got {tensor.dtype}")
        empty = False
        yield tensor
    if empty:
        what = "parameters that require gradients" if isinstance(params, nn.Module) else "tensors"
        raise ValueError(f"{name} got no {what}; an iterator may be used up: give it a list")


def _scaled(tensors: list[Tensor], absolute: bool, strength: float | Tensor) -> Tensor:
    if not isinstance(strength, Tensor) and not 0 <= strength < math.inf:
        raise ValueError(f"strength must be finite and >= 0, got {strength=}")
    if isinstance(strength, Tensor) and strength.numel() != 1:
        raise ValueError(f"strength must be one number, got shape {tuple(strength.shape)}")
    value = _value(tensors, absolute)
    return (
        value
        if isinstance(strength, (int, float)) and strength == 1
        else value * (strength.reshape(()) if isinstance(strength, Tensor) else strength)
    )


def _value(tensors: list[Tensor], absolute: bool) -> Tensor:
    if not any(map(is_dtensor, tensors)):
        return sum_of_powers(tensors, absolute)
    groups: dict[Shards | None, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(shards(tensor), []).append(_local(tensor))
    home = next(iter(groups.values()))[0].device
    total: Any = 0.0
    for over, own in groups.items():
        value = sum_of_powers(own, absolute)
        total = total + (value if over is None else _OverShards.apply(value, over)).to(home)
    return total


def _local(tensor: Any) -> Tensor:
    if not is_dtensor(tensor):
        return tensor
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"partial sums have no penalty of their own: redistribute {tensor.placements} first")
    return tensor.to_local(grad_placements=tensor.placements)


class _OverShards(torch.autograd.Function):
    """The sum over all ranks, on each, whose losses all hold it: the gradient of each is that of its own."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, over: Shards) -> Tensor:
        total = value.clone()
        over.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None
