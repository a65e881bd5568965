"""Intercepts layers and autograd: passes inputs of layers and gradients of their outputs to `BookKeeping`."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef

from .layers import CoveredLayer


class PatchedForward:
    """Replaces the `forward` method of a layer; copies and pickles of the model get the original one.

    With `shared`, all samples share its input, which then has no batch dimension; `None` if that is unknown.
    """

    def __init__(self, bookkeeping: Any, name: str, layer: CoveredLayer, shared: bool | None) -> None:
        self.bookkeeping, self.name, self.layer, self.shared = bookkeeping, name, layer, shared

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer, with a tap on its output if gradients are recorded."""
        module = self.layer.module
        if not torch.is_grad_enabled() or not any(
            p is not None and p.requires_grad for p in module._parameters.values()
        ):
            return type(module).forward(module, *args, **kwargs)
        if torch.compiler.is_compiling():  # ends the graph, so that what follows runs in eager mode
            raise RuntimeError("fastreg.privacy: a layer whose gradients are clipped cannot be in a graph")
        inputs = (*args, *kwargs.values())
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise TypeError(f"{self.name!r} must be called with one tensor, got {len(inputs)} arguments")
        run = self.bookkeeping.run
        if sys.modules.get("torch._dynamo") and torch._C._dynamo.eval_frame.get_eval_frame_callback():
            run = torch.compiler.disable(run)
        return run(self, inputs[0])

    def __reduce__(self) -> Any:
        return getattr, (self.layer.module, "forward")

    def expand_input(self, x: Tensor, samples: int, dim: int) -> Tensor:
        """Returns the input with a batch dimension of all samples, expanded if all samples share it.

        Raises:
            ValueError: If the input has another number of samples, or may be positions or ids of samples.
        """
        size = x.shape[dim] if x.dim() > dim else None
        if size == 1 and x.dim() > 1:
            return x.expand(*x.shape[:dim], samples, *x.shape[dim + 1 :])
        ids = x.dim() == 1 and not x.is_floating_point() and (size != samples or samples > 1)
        if self.shared is None and ids:
            if size == samples and _counts_up(x):
                raise ValueError(
                    f"{self.name!r} was given {size} ids that count up in a batch of {samples} samples: "
                    "if they are positions, the same for all samples, say "
                    f"shared_inputs=({self.name!r},) or give them as [1, positions]"
                )
            self.shared = size != samples
        if self.shared:
            return x.unsqueeze(dim).expand(*x.shape[:dim], samples, *x.shape[dim:])
        if size == samples:
            return x
        raise ValueError(
            f"the input {list(x.shape)} of {self.name!r} should have the {samples} samples of the batch in "
            f"dimension {dim}; freeze the layer, or let it keep samples apart"
        )


class LayerUse(NamedTuple):
    """One call of a covered layer in a forward pass."""

    bookkeeping: Any
    layer: CoveredLayer
    needed: list[str]  # names of its trainable parameters
    task: int  # backward pass in which it ran, for a checkpoint; -1 outside of backward passes
    batch: Any  # identity of the input of the model


class GradTap(torch.autograd.Function):
    """Passes a tensor through and its gradient to `BookKeeping`; parameters are inputs without a gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, use: LayerUse, count: int, *tensors: Tensor) -> Tensor:
        """Returns the same tensor; saves the first `count` others, which precede the parameters."""
        ctx.mark_dirty(out)  # not a new tensor: a view could not be changed in place
        ctx.use = use
        ctx.save_for_backward(*tensors[:count])
        ctx.count = count
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Returns the same gradient, after `BookKeeping` got it if a parameter's gradient is requested."""
        use = ctx.use
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: layers run on detached weights, gradients of gradients are not known"
            )
        nodes = ctx.next_functions[-len(use.needed) :]
        try:
            requested = [torch._C._will_engine_execute_node(node) for node, _ in nodes]
        except RuntimeError as error:
            raise RuntimeError(
                "torch.autograd.grad cannot ask for gradients that are clipped: call backward()"
            ) from error
        if wanted := [name for name, wants in zip(use.needed, requested, strict=True) if wants]:
            use.bookkeeping.record(use, ctx.saved_tensors, grad, wanted)
        return grad, None, None, *[None] * (ctx.count + len(use.needed))


def refuse_unclipped(name: str, grad: Tensor | None) -> None:
    """Refuses a gradient that autograd itself computed for a covered parameter (tensor hook)."""
    if grad is not None:
        raise RuntimeError(
            f"parameter {name!r} got a gradient that is not clipped: its weight is used outside of its layer"
        )


def refuse_batch_statistics(module: nn.Module, _: Any) -> None:
    """Refuses to train a layer that mixes samples (forward pre-hook)."""
    if module.training and torch.is_grad_enabled():
        raise RuntimeError(
            f"{type(module).__name__} in training mixes samples: call its eval(), or use GroupNorm"
        )


_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")


def main_input(args: tuple[Any, ...], kwargs: dict[str, Any], dim: int) -> Tensor | None:
    """Returns the input that tells the batch size: the first tensor with `dim`, or one with a known name."""
    first = [kwargs[name] for name in _INPUTS if name in kwargs]
    for leaf in torch.utils._pytree.tree_leaves((args, first, kwargs)):
        if isinstance(leaf, Mapping):  # but no dict, such as a BatchEncoding
            tensor = main_input((), dict(leaf), dim)
        elif dataclasses.is_dataclass(leaf):
            tensor = main_input((), vars(leaf), dim)
        else:
            tensor = leaf if isinstance(leaf, Tensor) and leaf.dim() > dim else None
        if tensor is not None:
            return tensor
    return None


class _Reference(WeakIdRef):
    """A weak reference to a tensor, equal only to references to the same tensor."""

    def __reduce__(self) -> Any:  # copies of models have tensors of their own
        return object, ()


def tensor_identity(x: Tensor) -> Any:
    """Returns a value that is equal only for the same tensor with unchanged content."""
    return _Reference(x), 0 if x.is_inference() else x._version


def _counts_up(x: Tensor) -> bool:
    """Returns whether ids may be positions that happen to be as many as samples."""
    return bool(torch.equal(x - x[:1], torch.arange(len(x), device=x.device, dtype=x.dtype)))
