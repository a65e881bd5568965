"""Computes penalties on the weights, to be added to a loss."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common.validation import check_range
from ..engine.layout import Shards, is_dtensor, shards
from ..ops.penalty import sum_of_powers

Parameters = nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


def l2_penalty(params: Parameters, strength: float | Tensor = 1.0) -> Tensor:
    """Returns strength · Σ p² over all elements of all tensors, as `sum(p.pow(2).sum() for p in params)`.

    ```python
    loss = F.cross_entropy(model(x), y) + fastreg.l2_penalty(model, 1e-4)
    ```

    One launch reads all tensors, and one writes all gradients 2gp; g stays on the device.  Sums are in
    float64 in a fixed order.  Derivatives of any order, `torch.func` and `torch.compile` work; forward mode
    does not.  Weight decay in an optimizer needs no extra pass: use penalties if they must be in the loss.

    Args:
        params: A model, whose parameters that require gradients are penalized; or tensors or named tensors,
            which are counted as often as they are listed.  Any real or complex floating dtypes and devices;
            DTensors, sharded or replicated, are counted as a whole on every rank.
        strength: Factor, ≥ 0; a 0-d tensor stays on its device, may be learned, and is not checked.

    Returns:
        0-d, on the device of the first tensor; float32, or float64 where a tensor is.

    Raises:
        TypeError: For other types and dtypes.
        ValueError: If there are no parameters, for a negative strength, and for DTensors of partial sums.

    Reference:
        Krogh & Hertz 1991, "A simple weight decay can improve generalization".
    """
    tensors = [
        torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in _listed(params, "l2_penalty()")
    ]
    return _scaled(tensors, False, strength)


def l1_penalty(params: Parameters, strength: float | Tensor = 1.0) -> Tensor:
    """Returns strength · Σ |p| over all elements of all tensors, as `sum(p.abs().sum() for p in params)`.

    The gradient is g · sign(p), 0 where p is 0. See `l2_penalty` for the rest.

    Args:
        params: See `l2_penalty`; complex tensors are not supported.
        strength: See `l2_penalty`.

    Returns:
        0-d, on the device of the first tensor; float32, or float64 where a tensor is.

    Raises:
        TypeError: For other types and dtypes, and for complex tensors.
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
        listed: Iterable[Any] = [p for p in params.parameters() if p.requires_grad]
    elif isinstance(params, Tensor):
        listed = [params]
    elif isinstance(params, Mapping) or not isinstance(params, Iterable):
        raise TypeError(f"{name} takes a model, tensors or named tensors, got {type(params).__name__}")
    else:
        listed = params
    empty = True
    for each in listed:
        tensor = each[1] if isinstance(each, tuple) and len(each) == 2 else each
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} takes tensors or (name, tensor) pairs, got {type(each).__name__}")
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.dtype.itemsize < 2:
            raise TypeError(f"{name} takes float16, bfloat16, float32 and float64, got {tensor.dtype}")
        empty = False
        yield tensor
    if empty:
        what = "parameters that require gradients" if isinstance(params, nn.Module) else "tensors"
        hint = "; an iterator may be used up: give it a list" if isinstance(params, Iterator) else ""
        raise ValueError(f"{name} got no {what}{hint}")


def _scaled(tensors: list[Tensor], absolute: bool, strength: float | Tensor) -> Tensor:
    if isinstance(strength, Tensor):
        if strength.numel() != 1:
            raise ValueError(f"strength must be one number, got shape {tuple(strength.shape)}")
        return _value(tensors, absolute) * strength.reshape(())
    check_range("strength", strength, 0)
    value = _value(tensors, absolute)
    return value if strength == 1 else value * strength


def _value(tensors: list[Tensor], absolute: bool) -> Tensor:
    if not any(map(is_dtensor, tensors)):
        return sum_of_powers(tensors, absolute)
    groups: dict[Shards | None, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(shards(tensor), []).append(_local(tensor))
    home = next(iter(groups.values()))[0].device
    total: Any = 0.0
    for over, local in groups.items():
        value = sum_of_powers(local, absolute)
        total = total + (value if over is None else _OverShards.apply(value, over)).to(home)
    return total


def _local(tensor: Any) -> Tensor:
    if not is_dtensor(tensor):
        return tensor
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"the penalty of partial sums is not defined: redistribute {tensor.placements} first"
        )
    return tensor.to_local(grad_placements=tensor.placements)


class _OverShards(torch.autograd.Function):
    """Sums values over all ranks; the gradient passes unchanged, since the loss of every rank has the sum."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, over: Shards) -> Tensor:
        total = value.clone()
        over.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None
