"""Brings views, channels-last and complex tensors, and shards of DTensors to dense real local memory.

Everything below the optimizer works on that.
"""

import bisect
import itertools
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.units import UnitLayout


class Shards(NamedTuple):
    """The parts of a sharded tensor: summing over these process groups sums over the whole tensor."""

    mesh: Any
    dims: tuple[int, ...]

    def all_reduce(self, value: Tensor, largest: bool = False) -> None:
        """Sums `value` over all shards, or takes the largest, in place."""
        operation = torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
        for dim in self.dims:
            torch.distributed.all_reduce(value, operation, group=self.mesh.get_group(dim))


def is_dtensor(tensor: Tensor) -> bool:
    """Returns whether a tensor is a DTensor, without importing the module of DTensors."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Returns the tensor itself, or the local part of a DTensor; complex numbers as pairs of real ones.

    Views that conjugate or negate are copied, so that memory holds their numbers.
    """
    inner = tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    inner = torch.view_as_real(inner.resolve_conj()) if inner.is_complex() else inner
    return inner.resolve_neg()


def local_gradient(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Returns the part of the gradient that belongs to the local part of the parameter."""
    if is_dtensor(parameter) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
        gradient = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return local(gradient)


def first_element(parameter: Tensor) -> int:
    """Returns the row-major index of the first local element in the whole tensor: 0 if it is not sharded.

    Raises:
        ValueError: If the local elements are not a contiguous run of the whole tensor.
    """
    if not is_dtensor(parameter):
        return 0
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placements = parameter.placements  # type: ignore[attr-defined]
    for placement in placements:
        if not isinstance(placement, Replicate) and (type(placement) is not Shard or placement.dim != 0):
            raise ValueError(
                f"parameters must be placed with Shard(0) or Replicate(), got {placements}; "
                "redistribute them or use a torch optimizer for them"
            )
    shape, mesh = parameter.shape, parameter.device_mesh  # type: ignore[attr-defined]
    _, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return offset[0] * shape[1:].numel() if shape else 0


def shards(parameter: Tensor) -> Shards | None:
    """Returns the mesh and its dimensions over which a parameter is split; `None` if it is not."""
    if not is_dtensor(parameter):
        return None
    placements = parameter.placements  # type: ignore[attr-defined]
    dims = tuple(i for i, placement in enumerate(placements) if placement.is_shard())
    return Shards(parameter.device_mesh, dims) if dims else None  # type: ignore[attr-defined]


def reshard(parameters: Iterable[Tensor]) -> None:
    """Makes FSDP2 gather parameters anew that are written outside of a training step.

    Between a forward pass without gradients and the next one, FSDP2 keeps the gathered parameters of the
    outermost module.  Only its private list of modules says which one that is; resharding others costs a
    gathering.
    """
    if not any(map(is_dtensor, parameters)):
        return
    fsdp = sys.modules.get("torch.distributed.fsdp")
    modules = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", {})
    if fsdp is not None:
        for module in list(modules):
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Returns strides of a dense tensor with the same order of dimensions: its own, if it is dense."""
    return torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()


def units(parameter: Tensor, strides: tuple[int, ...]) -> UnitLayout:
    """Returns the units of a local tensor: rows of a matrix, output channels of a convolution, else all.

    Args:
        parameter: The parameter.
        strides: Its dense layout.
    """
    inner = local(parameter)
    if parameter.dim() < 2 or inner.shape[0] < 2 or not inner.numel():
        return UnitLayout(max(inner.numel(), 1), 1)
    return UnitLayout(strides[0], inner.shape[0])


def with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Returns the tensor if it has these strides (in dimensions longer than 1), else a copy that has."""
    if all(size == 1 or a == b for size, a, b in zip(tensor.shape, tensor.stride(), strides, strict=True)):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def check(parameter: Tensor, gradient: Tensor) -> None:
    """Refuses parameters and gradients that cannot be updated element by element.

    Raises:
        ValueError: If elements of the parameter share memory.
        RuntimeError: If the gradient is sparse, has another shape, or is of other numbers: complex or not.
    """
    if gradient.layout != torch.strided:
        raise RuntimeError(
            f"sparse gradients are not supported, got layout {gradient.layout}; use torch.optim.SparseAdam"
        )
    if gradient.is_complex() != parameter.is_complex():
        raise RuntimeError(f"a gradient is of {gradient.dtype}, its parameter of {parameter.dtype}")
    if gradient.shape != parameter.shape:
        raise RuntimeError(
            f"a gradient has shape {tuple(gradient.shape)}, its parameter {tuple(parameter.shape)}; "
            "call zero_grad() after changing the data of a parameter"
        )
    if _overlaps(parameter):
        raise ValueError(
            f"elements of a parameter share memory: {tuple(parameter.shape)=}, {parameter.stride()=}; "
            "use .contiguous() before making it a parameter"
        )


def _overlaps(tensor: Tensor) -> bool:
    """Returns whether elements share memory; strides too irregular to decide count as such."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return tensor.numel() > 0
            reach = stride * (size - 1) + reach
    return False


def check_apart(tensors: list[Tensor], gradients: list[Tensor]) -> None:
    """Refuses parameters that share memory: all are updated at once, in any order.

    A gradient may lie just where its parameter does, element by element, and nowhere else in parameters.

    Raises:
        ValueError: If an element belongs to two parameters, or to a parameter and a gradient.
    """
    _check_parameters(tensors)
    spans = sorted((*_span(t), i) for i, t in enumerate(tensors) if t.numel())
    starts = [start for start, _, _ in spans]
    reach = list(itertools.accumulate((stop for _, stop, _ in spans), max))
    for i, gradient in enumerate(gradients):
        if not gradient.numel():
            continue
        start, stop = _span(gradient)
        k = bisect.bisect_left(starts, stop)
        while k and reach[k - 1] > start:  # one of those before may reach into the gradient
            k -= 1
            j = spans[k][2]
            if spans[k][1] <= start or tensors[j].device != gradient.device:
                continue
            same = i == j and tensors[j].data_ptr() == start and tensors[j].stride() == gradient.stride()
            if not same and _interleave([tensors[j], gradient]):
                raise ValueError(
                    f"a gradient of shape {tuple(gradient.shape)} shares memory with a parameter of shape "
                    f"{tuple(tensors[j].shape)}; give the parameter a .clone() of it"
                )


def _check_parameters(tensors: list[Tensor]) -> None:
    spans = sorted((t.device.index or 0, *_span(t), i) for i, t in enumerate(tensors) if t.numel())
    clusters: list[list[int]] = []
    reach = (-1, 0)
    for device, start, stop, i in spans:
        if (device, start) < reach:
            clusters[-1].append(i)
        else:
            clusters.append([i])
        reach = max(reach, (device, stop))
    for cluster in clusters:
        if len(cluster) > 1 and _interleave([tensors[i] for i in cluster]):
            shapes = ", ".join(str(tuple(tensors[i].shape)) for i in cluster)
            raise ValueError(
                f"parameters of shapes {shapes} share memory; give the optimizer the one tensor that "
                "holds it, or a .clone() of each"
            )


def _span(tensor: Tensor) -> tuple[int, int]:
    """Returns the first byte and the byte after the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _interleave(tensors: list[Tensor]) -> bool:
    """Returns whether tensors with overlapping spans have an element in common."""
    size, start = tensors[0].element_size(), min(map(Tensor.data_ptr, tensors))
    stop = max(_span(t)[1] for t in tensors)
    if any(t.element_size() != size or (t.data_ptr() - start) % size for t in tensors):
        return True
    owners = torch.zeros((stop - start) // size, dtype=torch.uint8, device="cpu")
    for t in tensors:
        view = owners.as_strided(t.shape, t.stride(), (t.data_ptr() - start) // size)
        if view.any():
            return True
        view.fill_(1)
    return False
