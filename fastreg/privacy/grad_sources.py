"""Provides sums of clipped gradients: from book-keeping, from Opacus' `p.grad_sample`, or its ghost clipping.

These sums are not private yet: they leave this package only with noise. All sources have the properties of
`BookKeeping` (`max_grad_norm`, `clipping`, `sensitivity`, `clipped_to`) and these methods:

    accumulate    clip the gradients of samples and keep their sum for a later step
    take          return the sum of each parameter, `None` for parameters without samples
    discard       drop the sums after a step has used them
    clear         clear gradients, and sums unless they are kept for a later step
    iterations    the number of batches in the sums, by which Opacus multiplies its sampling rate
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.validation import check_range
from ..reference.step import compute_dtype
from .bookkeeping import BookKeeping
from .bounds import clipping_bounds, sensitivity_of
from .clipped_sums import Clipped, clip_and_sum

Parameters = dict[Any, str]
"""Trainable parameters, and their names for errors."""

NOT_PRIVATE = (
    "there are no gradients of single samples, and to clip the gradient of a batch is not private. Write "
    "DPOptimizer(optimizer, model=model, ...), which clips every sample, or train an "
    "opacus.GradSampleModule(model), which leaves p.grad_sample"
)


class BookKeepingSource(BookKeeping):
    """Takes sums from `p.grad`, to which the backward passes of `BookKeeping` add them."""

    def iterations(self, parameters: Parameters) -> int:
        """Returns 1: backward passes that add up count as one batch."""
        return 1

    def accumulate(self, parameters: Parameters) -> None:
        """Does nothing, as the sums stay in `p.grad`."""

    def take(self, parameters: Parameters) -> list[Tensor | None]:
        """Returns the gradients of all parameters.

        Raises:
            RuntimeError: For gradients that were not made by a clipped backward pass.
        """
        covered = self.parameters
        for p, name in parameters.items():
            if p.grad is not None and (not self.samples or covered.get(name) is not p):
                raise RuntimeError(
                    f"the gradient of parameter {name!r} has not been clipped: make it by loss.backward() of "
                    "the model that the DPOptimizer has, and call zero_grad() after every step"
                )
        return [p.grad for p in parameters]

    def discard(self, parameters: Parameters) -> None:
        """Clears the gradients of all parameters."""
        self.clear(parameters, False)

    def clear(self, parameters: Parameters, keep_sums: bool) -> None:
        """Clears the gradients of all parameters unless they are sums for a later step."""
        if not keep_sums:
            for p in parameters:
                p.grad = None
            self.reset()


class _SummedGradSource:
    """Keeps sums in `p.summed_grad`, as the optimizers of Opacus do.

    Args:
        max_grad_norm: The bound, or a list with one for each parameter for `"per_layer"`.
        clipping: `"flat"` or `"per_layer"`.
    """

    def __init__(self, max_grad_norm: float | Sequence[float], clipping: str = "flat") -> None:
        self.max_grad_norm, self.clipping = max_grad_norm, clipping
        self.clipped_to: set[float] = set()

    @property
    def sensitivity(self) -> float:
        """The largest change of all sums together by one sample: C, or √(Σ C²) over layers."""
        value: Any = self.max_grad_norm
        return float(sensitivity_of([*map(float, value)] if isinstance(value, Sequence) else [float(value)]))

    def discard(self, parameters: Parameters) -> None:
        """Drops sums and gradients; `zero_grad` drops gradients of samples."""
        for p in parameters:
            p.grad = p.summed_grad = None
        self.clipped_to = set()

    def clear(self, parameters: Parameters, keep_sums: bool) -> None:
        """Clears gradients, those of samples too, and unless `keep_sums` also sums for a later step."""
        if not keep_sums:
            self.discard(parameters)
        for p in parameters:
            p.grad = p.grad_sample = None


class GradSampleSource(_SummedGradSource):
    """Sums `p.grad_sample` of Opacus' `GradSampleModule`: `[samples, *shape]`, or a list of such tensors."""

    clipped: list[Clipped]  # norms and factors of the samples summed last, by batch

    def bounds(self, count: int) -> list[float]:
        """Returns one bound, or with per-layer clipping one for each of `count` parameters.

        Raises:
            ValueError: For a wrong number of bounds, and for bounds that are not finite and > 0.
        """
        bounds = clipping_bounds(self.max_grad_norm, self.clipping, count)
        return [check_range("max_grad_norm", float(bound), 0, above=True) for bound in bounds]

    def iterations(self, parameters: Parameters) -> int:
        """Returns the length of lists of gradients, one entry for each backward pass."""
        grads = next((getattr(p, "grad_sample", None) for p in parameters), None)
        return len(grads) if isinstance(grads, list) else 1

    def accumulate(self, parameters: Parameters) -> None:
        """Clips `p.grad_sample` and adds the sum over samples to `p.summed_grad`.

        Raises:
            ValueError: For parameters without gradients of samples, and if numbers of samples differ.
            RuntimeError: If the gradients were summed before.
        """
        batches = {p: _grad_samples(p, name) for p, name in parameters.items()}
        missing = [name for p, name in parameters.items() if not batches[p]]
        if len(missing) == len(batches):
            if unclipped := [name for p, name in parameters.items() if p.grad is not None]:
                raise ValueError(f"parameter {unclipped[0]!r} has a gradient, but {NOT_PRIVATE}")
            return  # an empty batch
        if missing:
            raise ValueError(
                f"parameter {missing[0]!r} is trainable but has no gradients of single samples: freeze it by "
                "requires_grad_(False), or use it in the model"
            )
        sizes = {tuple(map(len, grads)) for grads in batches.values()}
        if len(sizes) > 1:
            raise ValueError(f"p.grad_sample must be of the same samples everywhere, got {sorted(sizes)}")
        (lengths,) = sizes
        bounds, self.clipped = self.bounds(len(batches)), []
        self.clipped_to.add(self.sensitivity)
        for i in range(len(lengths)):
            for p in batches:
                if getattr(p, "summed_grad", None) is None:
                    p.summed_grad = torch.zeros(p.shape, dtype=compute_dtype(p.dtype), device=p.device)
            grads = [grads[i] for grads in batches.values()]
            self.clipped.append(clip_and_sum(grads, [p.summed_grad for p in batches], bounds))
        for grads in batches.values():
            for grad in grads:
                grad._processed = True  # type: ignore[attr-defined]

    def take(self, parameters: Parameters) -> list[Tensor | None]:
        """Returns clipped sums, including those accumulated before."""
        self.accumulate(parameters)
        return [getattr(p, "summed_grad", None) for p in parameters]


def _grad_samples(p: Tensor, name: str) -> list[Tensor]:
    """Returns the per-sample gradients of a parameter, one tensor for each batch."""
    if not hasattr(p, "grad_sample"):
        raise ValueError(f"parameter {name!r} has no grad_sample: {NOT_PRIVATE}")
    if p.grad_sample is None:
        return []
    grads = p.grad_sample if isinstance(p.grad_sample, list) else [p.grad_sample]
    if any(hasattr(grad, "_processed") for grad in grads):
        raise RuntimeError(
            f"gradients of parameter {name!r} have been used: call zero_grad() after every step(), also "
            "after one that is skipped"
        )
    return grads


class OpacusGhostSource(_SummedGradSource):
    """Takes sums from `p.grad` after the second of both backward passes of Opacus' ghost clipping."""

    def iterations(self, parameters: Parameters) -> int:
        """Returns 1, as Opacus does not count batches here."""
        return 1

    def accumulate(self, parameters: Parameters) -> None:
        """Moves sums from `p.grad` to `p.summed_grad`, as the next first backward pass is not clipped."""
        for p, total in zip(parameters, self.take(parameters), strict=True):
            p.summed_grad = None if total is None else total.to(compute_dtype(p.dtype))
            p.grad = None

    def take(self, parameters: Parameters) -> list[Tensor | None]:
        """Returns the sums in `p.grad` together with sums accumulated before."""
        out = []
        for p in parameters:
            kept = getattr(p, "summed_grad", None)
            if kept is None or p.grad is None:
                out.append(p.grad if kept is None else kept)
            else:
                out.append(kept.add_(p.grad))
                p.grad = None  # a step that is taken again must not add it again
        return out


ClippedGradSource = BookKeepingSource | GradSampleSource | OpacusGhostSource
