"""Stands between layers and autograd: hands the engine what a layer is given and gets."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef

from .layers import Layer


class Forward:
    """Stands in the place of a layer's `forward`.  Copies and pickles of the model get their own back.

    Args:
        engine: Runs the layer.
        name: Of the layer.
        layer: How it runs.
        shared: Whether its input is the same for all samples and has no dimension of them, if that is known.
    """

    def __init__(self, engine: Any, name: str, layer: Layer, shared: bool | None) -> None:
        self.engine, self.name, self.layer, self.shared = engine, name, layer, shared

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer; with a tap on its output where gradients are asked for."""
        module = self.layer.module
        if not torch.is_grad_enabled() or not any(
            p is not None and p.requires_grad for p in module._parameters.values()
        ):
            return type(module).forward(module, *args, **kwargs)
        if torch.compiler.is_compiling():  # ends the graph, and runs what follows for real
            raise RuntimeError("fastreg.privacy: a layer whose gradients are clipped cannot be in a graph")
        inputs = (*args, *kwargs.values())
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise TypeError(f"{self.name!r} must be called with one tensor, got {len(inputs)} arguments")
        run = self.engine.run
        if sys.modules.get("torch._dynamo") and torch._C._dynamo.eval_frame.get_eval_frame_callback():
            run = torch.compiler.disable(run)
        return run(self, inputs[0])

    def __reduce__(self) -> Any:
        return getattr, (self.layer.module, "forward")


class Tap(torch.autograd.Function):
    """Lets a tensor through and hands its gradient to the engine; parameters are inputs that get nothing."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, use: Any, kept: int, *others: Tensor) -> Tensor:
        """The same tensor."""
        ctx.mark_dirty(out)  # not a new tensor: a view could not be changed in place
        ctx.use = use
        ctx.save_for_backward(*others[:kept])
        ctx.kept = kept
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The same gradient, noted if that of a parameter is asked for."""
        engine, layer, needed, inside, source = ctx.use
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: layers run on detached weights, gradients of gradients are not known"
            )
        nodes = ctx.next_functions[-len(needed) :]
        try:
            asked = [torch._C._will_engine_execute_node(node) for node, _ in nodes]
        except RuntimeError as error:
            raise RuntimeError(
                "torch.autograd.grad cannot ask for gradients that are clipped: call backward()"
            ) from error
        wanted = [name for name, is_asked in zip(needed, asked, strict=True) if is_asked]
        if wanted:
            engine.note(layer, ctx.saved_tensors, grad, wanted, inside, source)
        return grad, None, None, *[None] * (ctx.kept + len(needed))


def refuse(name: str, grad: Tensor | None) -> None:
    """Called with what autograd itself has for a covered parameter."""
    if grad is not None:
        raise RuntimeError(
            f"parameter {name!r} got a gradient that is not clipped: its weight is used outside of its layer"
        )


def no_batch_statistics(module: nn.Module, _: Any) -> None:
    """Called before a layer that may mix samples."""
    if module.training and torch.is_grad_enabled():
        raise RuntimeError(
            f"{type(module).__name__} in training mixes samples: call its eval(), or use GroupNorm"
        )


def main_input(args: tuple[Any, ...], kwargs: dict[str, Any], dim: int) -> Tensor | None:
    """What tells how many samples a model is given: the first input, or by name.  `None`: nothing does."""
    first = [kwargs[name] for name in _INPUTS if name in kwargs]
    for leaf in torch.utils._pytree.tree_leaves((args, first, kwargs)):
        if isinstance(leaf, Mapping):  # which is no dict, such as a BatchEncoding
            found = main_input((), dict(leaf), dim)
        elif dataclasses.is_dataclass(leaf):
            found = main_input((), vars(leaf), dim)
        else:
            found = leaf if isinstance(leaf, Tensor) and leaf.dim() > dim else None
        if found is not None:
            return found
    return None


class _Reference(WeakIdRef):
    """Of a tensor, which may be gone; equal for the same one only."""

    def __reduce__(self) -> Any:  # copies of models have tensors of their own
        return object, ()


def identity(x: Tensor) -> Any:
    """Equal for the same tensor with the same content only."""
    return _Reference(x), 0 if x.is_inference() else x._version


_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")


def counts_up(x: Tensor) -> bool:
    """Whether these may be positions, of which there happen to be as many as samples."""
    return bool(torch.equal(x - x[:1], torch.arange(len(x), device=x.device, dtype=x.dtype)))
