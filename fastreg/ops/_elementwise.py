"""Runs the operators that compute each element of a tensor by itself.

An operator is a row of data, `Elementwise`: a kernel and its reference.  `run` computes it on the backend of
its tensors.  `operator` registers it with torch, `one_by_one` is its `vmap`, and `run_compiled` compiles the
reference of any operator, elementwise or not.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.step import compute_dtype
from ..runtime import backend, device
from ..runtime.compile_ahead import LENGTH, compile_ahead
from ..runtime.launch_parameters import LaunchParameters, launch_parameters

REFERENCE_CHUNK = 2**17
"""Elements the reference works on at a time: its integers stay in the cache, and what a call of torch costs
is spread over many (4 M elements take 48 ms, in chunks of 2¹⁵ 74)."""
SHARED_LENGTHS = 769, 773
"""Example sizes of shared tensors for the compiler: equal to no other size."""

Tensors = Sequence[Tensor | None]
"""Arguments of an operator; `None` for an optional one that is absent."""


class Elementwise(NamedTuple):
    """An operator that computes each element by itself, for every backend.

    Attributes:
        name: Stem of the kernel, which is `fastreg_kernels.<name>.<name>_kernel`.
        reference: Computes a run of flat elements, `(elements, shared, seed, inner, first, dtype, *options)`:
            `first`, the index of the first one, is a multiple of 8; for the other arguments see `run`.
        constants: Returns the compile-time arguments of the kernel for `(shared, inner, dtype, *options)`.
    """

    name: str
    reference: Callable[..., Tensor]
    constants: Callable[..., dict[str, Any]]


def operator(name: str, result_dtype: Callable[..., torch.dtype] | None = None) -> Callable[..., Any]:
    """Registers a function as `fastreg::name`, whose result has the shape of its first argument.

    `result_dtype` returns its dtype for the arguments; by default it is that of the first one.
    """

    def register(function: Callable[..., Tensor]) -> Any:
        registered = torch.library.custom_op(f"fastreg::{name}", function, mutates_args=())

        @registered.register_fake
        def _(x: Tensor, *others: Any) -> Tensor:
            dtype = x.dtype if result_dtype is None else result_dtype(x, *others)
            return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)

        return registered

    return register


def run(
    operator: Elementwise, elements: Tensors, shared: Tensors, seed: Tensor, inner: int,
    options: tuple[Any, ...], dtype: torch.dtype, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Returns the result of an operator, computed on the backend of its first tensor.

    Args:
        operator: The operator.
        elements: Tensors of the shape of the result; the first is not `None`.
        shared: 1-d or 0-d tensors whose values are shared by many elements, such as a bias.
        seed: int64, 0-d.
        inner: Elements that follow each other and share a value.
        options: Further arguments of the reference; hashable.
        dtype: Of the result.
        out: Where the result goes, contiguous; may be the first tensor.
    """
    elements, shared = ([t if t is None else t.contiguous() for t in group] for group in (elements, shared))
    x = elements[0]
    assert x is not None
    name = backend.resolve(x.device, x.numel())
    if name == "triton":
        out = torch.empty(x.shape, dtype=dtype, device=x.device) if out is None else out
        launch(operator, elements, shared, seed, inner, options, out)
        return out
    flat = [t if t is None else t.view(-1) for t in elements]
    # The compiler takes a size of 1 for another kind of tensor.
    shared = [t.view(()) if t is not None and t.numel() == 1 else t for t in shared]
    if name == "compiled" and x.numel() > 1:
        tensors = [*flat, *shared, seed, torch.tensor(inner, device=x.device)]
        lengths = [LENGTH] * len(flat) + list(SHARED_LENGTHS[: len(shared)])
        sizes = tuple((length,) for length in lengths)
        result = run_compiled(_whole, tensors, sizes, (operator.reference, len(flat), dtype, *options))
        if result is not None:
            return result.view(x.shape) if out is None else out.copy_(result.view(x.shape))
    out = torch.empty(x.shape, dtype=dtype, device=x.device) if out is None else out
    known = known_seed(seed)
    for first in range(0, x.numel(), REFERENCE_CHUNK):
        chunk = slice(first, first + REFERENCE_CHUNK)
        parts = [t if t is None else t[chunk] for t in flat]
        out.view(-1)[chunk] = operator.reference(parts, shared, known, inner, first, dtype, *options)
    return out


def _whole(
    tensors: list[Any], reference: Callable[..., Tensor], elements: int, dtype: torch.dtype, *options: Any
) -> Tensor:
    """Calls a reference for all elements at once."""
    *tensors, seed, inner = tensors
    return reference(tensors[:elements], tensors[elements:], seed, inner, 0, dtype, *options)


def run_compiled(
    body: Callable[..., Any], tensors: Tensors, sizes: tuple[tuple[int, ...], ...], options: tuple[Any, ...]
) -> Any:
    """Returns `body(tensors, *options)`, computed by one program for all sizes, or `None` if compiling fails.

    Args:
        body: A function at the top level of a module.
        tensors: Its tensors, contiguous, without sizes of 0 or 1.
        sizes: An example of the size of each tensor, except for 0-d ones at the end; equal only where sizes
            always are.
        options: Further arguments of the body; hashable.
    """
    kinds = tuple(None if t is None else (t.dtype, t.dim()) for t in tensors)
    present = [t for t in tensors if t is not None]
    try:
        program = _program(body, kinds, sizes, options, present[0].device, torch.get_num_threads())
    except Exception as error:
        backend.cannot_compile(error)
        return None
    return program(present)


@functools.cache
def _program(
    body: Callable[..., Any], kinds: tuple[tuple[torch.dtype, int] | None, ...],
    sizes: tuple[tuple[int, ...], ...], options: tuple[Any, ...], where: torch.device, threads: int,
) -> Callable[..., Any]:  # fmt: skip
    """Compiles the body for dtypes and dimensions; Inductor builds in the number of threads."""

    def program(present: list[Tensor]) -> Any:
        remaining = iter(present)
        return body([kind if kind is None else next(remaining) for kind in kinds], *options)

    padded = [*sizes, *[()] * (len(kinds) - len(sizes))]
    examples = [
        torch.ones(size if kind[1] else (), dtype=kind[0], device=where)
        for kind, size in zip(kinds, padded, strict=True)
        if kind is not None
    ]
    return compile_ahead(program, (examples,))


def launch(
    operator: Elementwise, elements: Tensors, shared: Tensors, seed: Tensor, inner: int,
    options: tuple[Any, ...], out: Tensor,
) -> None:  # fmt: skip
    """Fills `out` with the kernel; for the arguments see `run`."""
    kernels = importlib.import_module(f"fastreg_kernels.{operator.name}")
    target = device.architecture(out.device)
    chosen = launch_parameters(operator.name, target)
    block = chosen.block_for(out.numel(), target)
    result = device.aligned(out)
    device.launch(
        getattr(kernels, f"{operator.name}_kernel"), -(-out.numel() // block), out.device,
        *_aligned(elements), result, seed, *_aligned(shared), out.numel(), inner,
        block // chosen.chunk(target.lanes),
        **constants(operator, shared, inner, options, out.dtype, chosen, target.lanes), **chosen.options,
    )  # fmt: skip
    if result is not out:
        out.copy_(result)


def constants(
    operator: Elementwise, shared: Tensors, inner: int, options: tuple[Any, ...], dtype: torch.dtype,
    chosen: LaunchParameters, lanes: int,
) -> dict[str, Any]:  # fmt: skip
    """Returns the compile-time arguments of a kernel, for warps of so many lanes."""
    return {
        **operator.constants(shared, inner, dtype, *options),
        "COMPUTE": device.triton_dtype(compute_dtype(dtype)),
        "CHUNK": chosen.chunk(lanes),
    }


def _aligned(tensors: Tensors) -> list[Tensor | None]:
    return [t if t is None else device.aligned(t) for t in tensors]


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Draws a seed from a generator, by default torch's own for the device: int64, 0-d, on the device."""
    if generator is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    options: Any = {"device": generator.device, "generator": generator}
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, **options).to(device)


def known_seed(seed: Tensor) -> Tensor | int:
    """Returns the seed as an integer, with which the reference works faster, if that waits for no device."""
    return int(seed) if seed.device.type == "cpu" else seed


def transformed() -> bool:
    """Returns whether a transformation of `torch.func` is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def one_by_one(
    apply: Callable[..., Tensor], info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[Tensor, int]:
    """Computes the `vmap` of an `autograd.Function`, given its `apply`, sample by sample."""
    columns = (
        value.unbind(dim) if isinstance(value, Tensor) and dim is not None else [value] * info.batch_size
        for value, dim in zip(inputs, in_dims, strict=True)
    )
    return torch.stack([apply(*arguments) for arguments in zip(*columns, strict=True)]), 0
