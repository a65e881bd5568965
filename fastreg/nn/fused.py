"""Dropout with what stands around it in a transformer: one pass over memory instead of two to four.

| module              | computes                                 | bf16 bytes an element, in parts |
|---------------------|------------------------------------------|---------------------------------|
| `DropoutAdd`        | residual + dropout(x)                    | 6 (11)                          |
| `BiasDropoutAdd`    | residual + dropout(x + bias)             | 6 (15)                          |
| `BiasActDropout`    | dropout(activation(x + bias))            | 4 (13)                          |
| `BiasActDropoutAdd` | residual + dropout(activation(x + bias)) | 6 (19)                          |

Masks are not stored: the backward pass keeps x where there is an activation, and otherwise only a seed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..reference.activations import ACTIVATIONS
from . import ops, rates
from .dropout import Rated
from .functional import draw_seed, inner_of
from .rates import Rate


def bias_act_dropout_add(
    x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, p: Rate = 0.5,
    training: bool = True, activation: str = "identity",
) -> Tensor:  # fmt: skip
    """The sum of the residual and of dropout(activation(x + bias)), in one pass.

    Args:
        x: `[..., features]`, of a floating dtype.
        bias: `[features]`.
        residual: Of the shape of x; the result has the wider dtype of both.
        p: The rate in [0, 1], or one for each feature.
        training: Whether to drop.
        activation: `"identity"`, `"relu"`, `"gelu"`, `"gelu_tanh"` or `"silu"`.

    Returns:
        Of the shape of x.  With an activation it can be differentiated once.

    Raises:
        TypeError: If x is not of a floating dtype.
        ValueError: For shapes that do not fit, an unknown activation, and rates out of range.
    """
    rates.checked(p)
    return fused(x, bias, residual, rates.thresholds(p, x.device) if training else None, activation)


def dropout_add(x: Tensor, residual: Tensor, p: Rate = 0.5, training: bool = True) -> Tensor:
    """The sum of the residual and of dropout(x), see `bias_act_dropout_add`."""
    return bias_act_dropout_add(x, None, residual, p, training)


def bias_dropout_add(
    x: Tensor, bias: Tensor, residual: Tensor, p: Rate = 0.5, training: bool = True
) -> Tensor:
    """The sum of the residual and of dropout(x + bias), see `bias_act_dropout_add`."""
    return bias_act_dropout_add(x, bias, residual, p, training)


def bias_act_dropout(
    x: Tensor, bias: Tensor, p: Rate = 0.5, training: bool = True, activation: str = "gelu"
) -> Tensor:
    """Dropout(activation(x + bias)), see `bias_act_dropout_add`."""
    return bias_act_dropout_add(x, bias, None, p, training, activation)


def fused(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, thresholds: Tensor | None, activation: str
) -> Tensor:
    """`bias_act_dropout_add` with rates as an int32 tensor, see `rates.thresholds`, on the device of x.

    `None` keeps everything, and draws no random number.
    """
    if not x.is_floating_point():
        raise TypeError(f"dropout needs a floating dtype, got {x.dtype}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"bias must have the {x.shape[-1:]} features of x, got shape {tuple(bias.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of x, got {tuple(residual.shape)} and {tuple(x.shape)}; "
            "use .expand_as(x)"
        )
    if thresholds is None:
        seed = torch.zeros((), dtype=torch.int64, device=x.device)
        thresholds = torch.zeros((), dtype=torch.int32, device=x.device)
    else:
        seed = draw_seed(x.device)
    inner = inner_of(x.shape, thresholds, -1)
    return ops.BiasActDropoutAdd.apply(x, bias, residual, seed, thresholds, inner, activation)


class Fused(Rated):
    """Base of the modules.  Outside of training all but dropping is done.

    Args:
        features: Size of the bias, drawn as `nn.Linear` with as many inputs draws it; `None`: there is none.
        p: The rate in [0, 1], or one for each feature.
        activation: See `bias_act_dropout_add`.
        factory: `device` and `dtype` of the bias.

    Raises:
        ValueError: For an unknown activation, and rates out of range.
    """

    def __init__(self, features: int | None, p: Rate, activation: str = "identity", **factory: Any) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}"
            )
        self.p = p
        self.features, self.activation = features, activation
        self.bias = None if features is None else nn.Parameter(torch.empty(features, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bias."""
        if self.bias is not None:
            bound = 1 / math.sqrt(self.bias.numel()) if self.bias.numel() else 0
            nn.init.uniform_(self.bias, -bound, bound)

    def _fused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        thresholds = self.thresholds if self.training else None
        return fused(x, self.bias, residual, thresholds, self.activation)

    def extra_repr(self) -> str:
        """The arguments."""
        shown = [] if self.features is None else [f"features={self.features}"]
        shown.append(f"p={self.p}")
        shown += [f"activation={self.activation!r}"] if self.activation != "identity" else []
        return ", ".join(shown)


class DropoutAdd(Fused):
    """The sum of the residual and of dropout(x), in one pass.

    Args:
        p: The rate in [0, 1], or one for each feature.
    """

    def __init__(self, p: Rate = 0.5) -> None:
        super().__init__(None, p)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """`[..., features]` twice, and the same."""
        return self._fused(x, residual)


class BiasDropoutAdd(Fused):
    """The sum of the residual and of dropout(x + bias), in one pass: behind `nn.Linear(..., bias=False)`.

    Args:
        features: Size of the bias.
        p: The rate in [0, 1], or one for each feature.
        device: Of the bias.
        dtype: Of the bias.
    """

    def __init__(
        self, features: int, p: Rate = 0.5, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(features, p, device=device, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """`[..., features]` twice, and the same."""
        return self._fused(x, residual)


class BiasActDropout(Fused):
    """Dropout(activation(x + bias)), in one pass: between `nn.Linear(..., bias=False)` and the next.

    Args:
        features: Size of the bias.
        p: The rate in [0, 1], or one for each feature.
        activation: `"gelu"`, `"gelu_tanh"`, `"relu"`, `"silu"` or `"identity"`.
        device: Of the bias.
        dtype: Of the bias.
    """

    def __init__(
        self, features: int, p: Rate = 0.5, activation: str = "gelu", *, device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(features, p, activation, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., features]`, and the same."""
        return self._fused(x, None)


class BiasActDropoutAdd(BiasActDropout):
    """The sum of the residual and of dropout(activation(x + bias)), in one pass.

    Args:
        features: Size of the bias.
        p: The rate in [0, 1], or one for each feature.
        activation: `"gelu"`, `"gelu_tanh"`, `"relu"`, `"silu"` or `"identity"`.
        device: Of the bias.
        dtype: Of the bias.
    """

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        """`[..., features]` twice, and the same."""
        return self._fused(x, residual)
