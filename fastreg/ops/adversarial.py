"""Moves adversarial inputs by kernels, by the compiled reference or by the reference.

`move` takes a step; `norms` computes the norms of samples that a step or a projection needs.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import adversarial as reference
from ..reference.step import compute_dtype
from ..runtime import backend
from ..runtime.device import aligned, architecture, launch
from ..runtime.launch_parameters import LaunchParameters, launch_parameters
from ._elementwise import known_seed, run_compiled

SAMPLES, ELEMENTS = 773, 1361
"""Example sizes for the compiler: equal to no other size, and long enough for Inductor to use all threads."""
EXAMPLES = (*[(SAMPLES, ELEMENTS)] * 3, (SAMPLES, 3), (SAMPLES,), (ELEMENTS,), (ELEMENTS,))
"""Example sizes of x, gradient, clean, step_scalars, peaks, lower and upper."""


class Bounds(NamedTuple):
    """The bounds of elements: element i of a sample has those at i / spatial % len(lower)."""

    lower: Tensor  # 0-d, or `[channels]`
    upper: Tensor  # of the same shape
    spatial: int  # elements that follow each other in a channel

    def expand(self, elements: int) -> tuple[Tensor, Tensor]:
        """Returns the bounds of each element of a sample."""
        if not self.lower.dim():
            return self.lower, self.upper
        index = torch.arange(elements, device=self.lower.device) // self.spatial % len(self.lower)
        return self.lower[index], self.upper[index]


class StepInputs(NamedTuple):
    """The inputs of a step or of a norm, see `reference.adversarial.step`; all tensors are contiguous."""

    x: Tensor
    gradient: Tensor | None
    clean: Tensor | None
    step_scalars: Tensor | None
    kind: str
    peaks: Tensor | None = None
    seed: Tensor | None = None


def move(inputs: StepInputs, ball: str, bounds: Bounds | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns points after a step in a dtype, and the same in compute precision, `[samples, elements]`.

    They are one tensor if both are the same.  For the arguments see `reference.adversarial.step`.
    """
    x = inputs.x
    name = backend.resolve(x.device, x.numel())
    if name == "triton":
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        compute = compute_dtype(dtype)
        master = out if compute == dtype else torch.empty(x.shape, dtype=compute, device=x.device)
        launch_step(inputs, ball, bounds, out, None if master is out else master)
        return out, master
    limits = (None, None) if bounds is None else bounds.expand(x.shape[1])
    tensors = x, inputs.gradient, inputs.clean, _scalars_of_all(inputs), inputs.peaks, *limits
    result = _by_reference(reference.step, tensors, inputs, name, ball, dtype)
    return (result[0], result[0]) if result[1].dtype == dtype else result


def norms(inputs: StepInputs, order: int) -> Tensor:
    """Returns norms of samples, `[samples, 1]` in compute precision, see `reference.adversarial.size`."""
    x = inputs.x
    name = backend.resolve(x.device, x.numel())
    if name == "triton":
        block = launch_parameters("adversarial_norm", architecture(x.device)).block
        partial = torch.empty(len(x), blocks_of(x, block), dtype=torch.float64, device=x.device)
        launch_norm(inputs, order, partial)
        total = partial.sum(1, keepdim=True)
        return (total.sqrt() if order == 2 else total).to(compute_dtype(x.dtype))
    tensors = x, inputs.gradient, inputs.clean, _scalars_of_all(inputs)
    return _by_reference(reference.size, tensors, inputs, name, order)


# The reference ----------------------------------------------------------------------------------------------


def _by_reference(
    function: Callable[..., Any], tensors: Sequence[Tensor | None], inputs: StepInputs, name: str,
    *options: Any,
) -> Any:  # fmt: skip
    """Returns `function(*tensors, seed, kind, *options)`, compiled if that is the backend."""
    x, seed = inputs.x, inputs.seed
    seed = torch.zeros((), dtype=torch.int64, device=x.device) if seed is None else seed
    options = function, inputs.kind, *options
    if name == "compiled" and min(x.shape) > 1:
        contiguous = [t if t is None else t.contiguous() for t in (*tensors, seed)]
        result = run_compiled(_call, contiguous, EXAMPLES[: len(tensors)], options)
        if result is not None:
            return result
    return _call([*tensors, known_seed(seed)], *options)


def _call(tensors: list[Any], function: Callable[..., Any], *options: Any) -> Any:
    return function(*tensors, *options)


def _scalars_of_all(inputs: StepInputs) -> Tensor | None:
    scalars = inputs.step_scalars
    return scalars if scalars is None else scalars.expand(len(inputs.x), -1)


# The kernels ------------------------------------------------------------------------------------------------


def launch_step(
    inputs: StepInputs, ball: str, bounds: Bounds | None, out: Tensor, master: Tensor | None
) -> None:
    """Launches the kernel that fills `out`, and `master` if there is one; for arguments see `move`."""
    kernels = importlib.import_module("fastreg_kernels.adversarial")
    target = architecture(out.device)
    chosen = launch_parameters("adversarial_step", target)
    (samples, elements), blocks = out.shape, blocks_of(out, chosen.block)
    lower, upper, spatial = (None, None, 1) if bounds is None else bounds
    launch(
        kernels.adversarial_step_kernel, samples * blocks, out.device,
        (*_aligned(inputs), out, master), inputs.step_scalars, inputs.peaks, lower, upper, inputs.seed,
        _row_stride(inputs), elements, blocks, spatial, 1 if lower is None else lower.numel(), BALL=ball,
        BOUNDS="none" if lower is None else "table" if lower.dim() else "scalar",
        **constants(inputs.kind, chosen, target.lanes), **chosen.options,
    )  # fmt: skip


def launch_norm(inputs: StepInputs, order: int, partial: Tensor) -> None:
    """Launches the kernel that fills `partial`, float64 `[samples, programs of a sample]`."""
    kernels = importlib.import_module("fastreg_kernels.adversarial")
    target = architecture(partial.device)
    chosen = launch_parameters("adversarial_norm", target)
    (samples, elements), blocks = inputs.x.shape, partial.shape[1]
    launch(
        kernels.adversarial_norm_kernel, samples * blocks, partial.device,
        *_aligned(inputs), partial, inputs.step_scalars, inputs.seed, _row_stride(inputs), elements, blocks,
        SQUARES=order == 2, **constants(inputs.kind, chosen, target.lanes), **chosen.options,
    )  # fmt: skip


def blocks_of(x: Tensor, block: int) -> int:
    """Returns the number of programs for each sample of `[samples, elements]`, for a size of blocks."""
    return -(-(x.shape[1] + 15) // block)


def _aligned(inputs: StepInputs) -> list[Tensor | None]:
    return [t if t is None else aligned(t) for t in (inputs.x, inputs.gradient, inputs.clean)]


def _row_stride(inputs: StepInputs) -> int:
    """Returns the distance between the step scalars of two samples, 0 if all share one row."""
    return 3 if inputs.step_scalars is not None and len(inputs.step_scalars) > 1 else 0


def constants(kind: str, chosen: LaunchParameters, lanes: int) -> dict[str, Any]:
    """Returns the compile-time arguments that both kernels have, for warps of so many lanes."""
    return {"KIND": kind, "BLOCK": chosen.block, "CHUNK": chosen.chunk(lanes)}
