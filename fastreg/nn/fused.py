"""Fuses dropout with its neighbours in a transformer: one pass over memory instead of two to four.

| module              | computes                                 | bf16 bytes an element, in parts |
|---------------------|------------------------------------------|---------------------------------|
| `DropoutAdd`        | residual + dropout(x)                    | 6 (11)                          |
| `BiasDropoutAdd`    | residual + dropout(x + bias)             | 6 (15)                          |
| `BiasActDropout`    | dropout(activation(x + bias))            | 4 (13)                          |
| `BiasActDropoutAdd` | residual + dropout(activation(x + bias)) | 6 (19)                          |

Masks are not stored: the backward pass keeps x where there is an activation, and otherwise only a seed.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..common.validation import check_choice
from ..ops.dropout import fused_drop
from ..reference.activations import ACTIVATIONS
from .dropout import _DropoutBase
from .rates import Rate


class _FusedDropoutBase(_DropoutBase):
    """Base of the fused modules; in evaluation they do everything but drop.  `None` features mean no bias."""

    def __init__(
        self, features: int | None, p: Rate = 0.5, activation: str = "gelu", *, device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.p = p
        check_choice("activation", activation, ACTIVATIONS)
        self.features, self.activation = features, activation
        bias = None if features is None else torch.empty(features, device=device, dtype=dtype)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the bias from a uniform distribution."""
        if self.bias is not None:
            bound = 1 / math.sqrt(self.bias.numel()) if self.bias.numel() else 0
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Computes the output of two inputs `[..., features]`, in their shape."""
        drop_thresholds = self.drop_thresholds if self.training else None
        return fused_drop(x, self.bias, residual, drop_thresholds, self.activation)

    def extra_repr(self) -> str:
        """Returns the arguments for `repr`."""
        features = "" if self.features is None else f"features={self.features}, "
        activation = "" if self.activation == "identity" else f", activation={self.activation!r}"
        return f"{features}p={self.p}{activation}"


class DropoutAdd(_FusedDropoutBase):
    """Computes residual + dropout(x) in one pass.

    Args:
        p: The rate in [0, 1], or one for each feature.
    """

    def __init__(self, p: Rate = 0.5) -> None:
        super().__init__(None, p, "identity")


class BiasDropoutAdd(_FusedDropoutBase):
    """Computes residual + dropout(x + bias) in one pass, after `nn.Linear(..., bias=False)`.

    Args:
        features: Size of the bias.
        p: The rate in [0, 1], or one for each feature.
        device: Of the bias.
        dtype: Of the bias.
    """

    def __init__(
        self, features: int, p: Rate = 0.5, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(features, p, "identity", device=device, dtype=dtype)


class BiasActDropout(_FusedDropoutBase):
    """Computes dropout(activation(x + bias)) in one pass, after `nn.Linear(..., bias=False)`.

    Args:
        features: Size of the bias, drawn as by an `nn.Linear` with as many inputs.
        p: The rate in [0, 1], or one for each feature.
        activation: `"gelu"`, `"gelu_tanh"`, `"relu"`, `"silu"` or `"identity"`.
        device: Of the bias.
        dtype: Of the bias.

    Raises:
        ValueError: For an unknown activation, and rates out of range.
    """

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Computes the output of an input `[..., features]`, in its shape."""
        return super().forward(x, None)


class BiasActDropoutAdd(_FusedDropoutBase):
    """Computes residual + dropout(activation(x + bias)) in one pass.

    Args:
        features: Size of the bias.
        p: The rate in [0, 1], or one for each feature.
        activation: `"gelu"`, `"gelu_tanh"`, `"relu"`, `"silu"` or `"identity"`.
        device: Of the bias.
        dtype: Of the bias.
    """
