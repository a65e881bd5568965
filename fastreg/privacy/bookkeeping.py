"""Per-sample clipped gradients by one backward pass: the book-keeping of Bu et al. 2023."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import Parameter

Bound = float | Tensor


class BookKeeping:
    """Per-sample clipped gradients of a model by one backward pass.

    After `loss.backward()`, `p.grad` of every trainable parameter is the sum over the samples of their
    clipped gradients, divided by nothing, in float32 for 16-bit parameters too; further backward passes add
    to it.  `p.grad` is written when the backward pass ends.

    Args:
        model: Whose trainable parameters are covered.
        max_grad_norm: The bound C.  With `"per_layer"` a bound for each parameter, by name or in the order of
            `model.parameters()`; one number then is shared: each parameter gets C / √n.
        clipping: `"flat"` or `"per_layer"` (every parameter tensor by itself, as Opacus has it).
        loss_reduction: `"mean"` or `"sum"`.
        batch_dim: Where the samples are in the input of every layer, 0 or 1.
        attach: Whether to attach at once.
    """

    norms: Tensor | None
    """`[batch]`, the norms at the latest backward pass; not private."""
    clipped_samples: Tensor
    """How many samples were clipped so far: 0-d int64 on the device; not private."""
    nonfinite_samples: Tensor
    """How many samples counted for nothing, since their gradient is not finite: likewise."""
    samples: int
    """How many samples are in `p.grad`."""

    def __init__(
        self, model: nn.Module, *,
        max_grad_norm: Bound | Mapping[str, Bound] | Sequence[Bound] = 1.0,
        clipping: Literal["flat", "per_layer"] = "flat", loss_reduction: Literal["mean", "sum"] = "mean",
        batch_dim: int = 0, attach: bool = True,
    ) -> None:  # fmt: skip
        raise NotImplementedError

    @property
    def parameters(self) -> dict[str, Parameter]:
        """The parameters that are covered, by name."""
        raise NotImplementedError

    @property
    def sensitivity(self) -> float | Tensor:
        """By how much one sample changes all `p.grad` together at most: C, or √(Σ C²) over the layers."""
        raise NotImplementedError

    def attach(self) -> None:
        """Take over the gradients of the model."""
        raise NotImplementedError

    def detach(self) -> None:
        """Give the gradients back to autograd."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget samples and unfinished passes; `p.grad` is left alone."""
        raise NotImplementedError
