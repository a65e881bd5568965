"""Where sums of clipped gradients come from: book-keeping, gradients held per sample, or ghost clipping.

Whatever is here is not private yet: it leaves this package only with noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..engine import layout
from ..ops.per_sample import Clipped, clip_and_sum
from ..reference.step import compute_dtype
from .bookkeeping import BookKeeping

Parameters = dict[Any, str]
"""Trainable parameters, and what errors call them."""

NOT_PRIVATE = (
    "there are no gradients of single samples, and to clip the gradient of a batch is not private. Write "
    "DPOptimizer(optimizer, model=model, ...), which clips every sample, or train an "
    "opacus.GradSampleModule(model), which leaves p.grad_sample"
)


class Source(Protocol):
    """What clips, and keeps the sum until a step takes it."""

    max_grad_norm: Any

    @property
    def clipping(self) -> str:
        """`"flat"` or `"per_layer"`."""

    @property
    def sensitivity(self) -> float:
        """By how much one sample changes all sums together at most."""

    @property
    def clipped_to(self) -> set[float]:
        """The sensitivities with which the sums that are kept were clipped."""

    def iterations(self, parameters: Parameters) -> int:
        """How many batches there are that count as batches of their own."""

    def keep(self, parameters: Parameters) -> None:
        """Clip what there is, and keep its sum for a later step."""

    def take(self, parameters: Parameters) -> list[Tensor | None]:
        """The sum of each parameter; `None` where no sample contributes."""

    def used(self, parameters: Parameters) -> None:
        """A step has taken the sums: no other may."""

    def clear(self, parameters: Parameters, kept: bool) -> None:
        """Forget gradients, but not sums that are kept for a later step."""


class BookKept:
    """Sums in `p.grad`, left there by the book-keeping engine.

    Args:
        engine: The engine.
    """

    def __init__(self, engine: BookKeeping) -> None:
        self.engine = engine

    @property
    def clipping(self) -> str:
        """As the engine does it."""
        return self.engine.clipping

    @property
    def max_grad_norm(self) -> Any:
        """That of the engine."""
        return self.engine.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: Any) -> None:
        self.engine.max_grad_norm = value

    @property
    def sensitivity(self) -> float:
        """That of the engine."""
        return float(self.engine.sensitivity)

    @property
    def clipped_to(self) -> set[float]:
        """As the engine did it."""
        return self.engine.clipped_to

    def iterations(self, parameters: Parameters) -> int:
        """What adds up is one."""
        return 1

    def keep(self, parameters: Parameters) -> None:
        """They stay where they are."""

    def take(self, parameters: Parameters) -> list[Tensor | None]:
        """What the engine has left.

        Raises:
            RuntimeError: For gradients that it has not made.
        """
        covered = self.engine.parameters
        for p, name in parameters.items():
            if p.grad is not None and (not self.engine.samples or covered.get(name) is not p):
                raise RuntimeError(
                    f"the gradient of parameter {name!r} has not been clipped: make it by loss.backward() of "
                    "the model that the DPOptimizer has, and call zero_grad() after every step"
                )
        return [p.grad for p in parameters]

    def used(self, parameters: Parameters) -> None:
        """Let go of them."""
        self.clear(parameters, False)

    def clear(self, parameters: Parameters, kept: bool) -> None:
        """Kept ones lie in `p.grad`, which is left alone then."""
        if not kept:
            for p in parameters:
                p.grad = None
            self.engine.reset()


class PerSample:
    """Sums of `p.grad_sample`, `[samples, *shape]` or a list of such, as Opacus' `GradSampleModule` has it.

    Args:
        max_grad_norm: The bound, or for `"per_layer"` that of each parameter.
        clipping: `"flat"` or `"per_layer"`.
    """

    def __init__(self, max_grad_norm: float | Sequence[float], clipping: str) -> None:
        self.max_grad_norm, self.clipping = max_grad_norm, clipping
        self.clipped: list[Clipped] = []
        self.clipped_to: set[float] = set()

    @property
    def sensitivity(self) -> float:
        """C, or √(Σ C²) over the layers."""
        given: Any = self.max_grad_norm
        return math.hypot(*map(float, given)) if isinstance(given, Sequence) else float(given)

    def bounds(self, count: int) -> list[float]:
        """One bound, or that of each of so many parameters; one number is shared out among them.

        Raises:
            ValueError: For another number of bounds.
        """
        given: Any = self.max_grad_norm
        if self.clipping == "flat":
            bounds = [given]
        elif isinstance(given, (Sequence, Mapping)):
            bounds = list(given) if isinstance(given, Sequence) else [given]
        else:
            bounds = [given / math.sqrt(count)] * count
        wanted = 1 if self.clipping == "flat" else count
        if isinstance(bounds[0], (Sequence, Mapping)) or len(bounds) != wanted:
            raise ValueError(
                f"max_grad_norm must be one number{'' if self.clipping == 'flat' else f' or {count}'} with "
                f"clipping={self.clipping!r}, got {given!r}"
            )
        for bound in bounds:
            if not 0 < float(bound) < math.inf:
                raise ValueError(f"max_grad_norm must be finite and > 0, got {float(bound)}")
        return [float(bound) for bound in bounds]

    def iterations(self, parameters: Parameters) -> int:
        """Batches whose gradients lie beside each other."""
        held = next((getattr(p, "grad_sample", None) for p in parameters), None)
        return len(held) if isinstance(held, list) else 1

    def keep(self, parameters: Parameters) -> None:
        """Clip and sum `p.grad_sample`.

        Raises:
            ValueError: If some have none, which are named, or they are of different batches.
            RuntimeError: If they have been summed before.
        """
        every = {p: _samples(p, name) for p, name in parameters.items()}
        missing = [name for p, name in parameters.items() if not every[p]]
        if len(missing) == len(every):
            made = [name for p, name in parameters.items() if p.grad is not None]
            if made:
                raise ValueError(f"parameter {made[0]!r} has a gradient, but {NOT_PRIVATE}")
            return  # no sample at all: an empty batch
        if missing:
            raise ValueError(
                f"parameter {missing[0]!r} is trainable but has no gradients of single samples: freeze it by "
                "requires_grad_(False), or use it in the model"
            )
        sizes = {tuple(map(len, parts)) for parts in every.values()}
        if len(sizes) > 1:
            raise ValueError(f"p.grad_sample must be of the same samples everywhere, got {sorted(sizes)}")
        (lengths,) = sizes
        bounds, self.clipped = self.bounds(len(every)), []
        self.clipped_to.add(self.sensitivity)
        for i in range(len(lengths)):
            held = any(getattr(p, "summed_grad", None) is not None for p in every)
            make = torch.zeros if held else torch.empty
            for p in every:
                if getattr(p, "summed_grad", None) is None:
                    p.summed_grad = make(p.shape, dtype=compute_dtype(p.dtype), device=p.device)
            sums = [p.summed_grad for p in every]
            self.clipped.append(clip_and_sum([parts[i] for parts in every.values()], sums, bounds, held))
        for parts in every.values():
            for part in parts:
                part._processed = True  # type: ignore[attr-defined]

    def take(self, parameters: Parameters) -> list[Tensor | None]:
        """Clip and sum, on top of what has been kept."""
        self.keep(parameters)
        return [getattr(p, "summed_grad", None) for p in parameters]

    def used(self, parameters: Parameters) -> None:
        """Let go of sums and of the batch's gradient; what is held per sample goes with `zero_grad`."""
        self.clipped_to = set()
        for p in parameters:
            p.summed_grad = p.grad = None

    def clear(self, parameters: Parameters, kept: bool) -> None:
        """As Opacus does it."""
        if not kept:
            self.clipped_to = set()
        for p in parameters:
            p.grad_sample = p.grad = None
            if not kept:
                p.summed_grad = None


def _samples(p: Tensor, name: str) -> list[Tensor]:
    """What is held per sample of a parameter, a tensor for each batch."""
    if not hasattr(p, "grad_sample"):
        raise ValueError(f"parameter {name!r} has no grad_sample: {NOT_PRIVATE}")
    if p.grad_sample is None:
        return []
    parts = p.grad_sample if isinstance(p.grad_sample, list) else [p.grad_sample]
    if any(hasattr(part, "_processed") for part in parts):
        raise RuntimeError(
            f"gradients of parameter {name!r} have been used: call zero_grad() after every step(), also "
            "after one that is skipped"
        )
    return parts


class Ghost:
    """Sums in `p.grad`, left there by the second of the two backward passes of Opacus' ghost clipping.

    Args:
        max_grad_norm: What they have been clipped to.
    """

    clipping = "flat"
    clipped_to: set[float] = set()  # that is Opacus' business

    def __init__(self, max_grad_norm: float) -> None:
        self.max_grad_norm = max_grad_norm

    @property
    def sensitivity(self) -> float:
        """C."""
        return float(self.max_grad_norm)

    def iterations(self, parameters: Parameters) -> int:
        """Opacus, too, does not count them."""
        return 1

    def keep(self, parameters: Parameters) -> None:
        """Move them aside: the next first backward pass is not clipped."""
        for p, total in zip(parameters, self.take(parameters), strict=True):
            p.summed_grad = None if total is None else total.to(compute_dtype(p.dtype))
            p.grad = None

    def take(self, parameters: Parameters) -> list[Tensor | None]:
        """With those that have been moved aside."""
        out = []
        for p in parameters:
            kept = getattr(p, "summed_grad", None)
            if kept is None or p.grad is None:
                out.append(p.grad if kept is None else kept)
            else:
                out.append(kept.add_(p.grad))
                p.grad = None  # a step that is taken again must not add it again
        return out

    def used(self, parameters: Parameters) -> None:
        """Let go of them."""
        self.clear(parameters, False)

    def clear(self, parameters: Parameters, kept: bool) -> None:
        """As Opacus does it."""
        for p in parameters:
            p.grad = None
            if not kept:
                p.summed_grad = None


def reduced(sums: list[Tensor], group: Any) -> list[Tensor]:
    """Added up over the processes of a group; shards belong to one process each, and are whole already."""
    sums = [total if layout.is_dtensor(total) else total.contiguous() for total in sums]
    works = [
        torch.distributed.all_reduce(total, group=group, async_op=True)
        for total in sums
        if not layout.is_dtensor(total)
    ]
    for work in works:
        work.wait()
    return sums
