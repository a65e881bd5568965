"""Defines regularizers that run in an optimizer's step: `regularizers=[ClipNorm(1.0), EMA(0.999)]`."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..common.random import Purpose, key
from ..common.validation import check_flag, check_range, check_tensors
from ..engine.batch import Batch
from ..engine.component import Component, Phase
from ..engine.device_scalars import DeviceScalars
from ..engine.launch import unit_squares
from ..engine.layout import Shards
from ..engine.plan import Plan
from ..engine.stage import Buffer, Stage
from ..reference import regularizers as reference
from .rules import values

__all__ = [
    "L1", "L2SP", "AdaptiveClip", "ClipNorm", "ClipValue", "GradientNoise",
]  # fmt: skip


class ClipNorm(Component):
    """Global gradient norm clipping: g ← g · min(max_norm / (‖g‖ + 1e-6), 1) over all groups.

    The same factor as `torch.nn.utils.clip_grad_norm_`, applied in registers: `.grad` keeps its contents.
    The norm before clipping is `optimizer.grad_norm`.  Under a `torch.amp.GradScaler` the norm is that of the
    unscaled gradients; do not call `scaler.unscale_` yourself, it would be another pass.

    Args:
        max_norm: Largest norm of all gradients together; > 0, may be infinite (then it only measures).
        norm_type: 2, or `math.inf` for the largest absolute element (of complex ones: part).
        error_if_nonfinite: As the optimizer's `nonfinite="raise"`.

    Raises:
        ValueError: If max_norm is not positive, or for another norm_type.

    Reference:
        Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural networks".
    """

    phase = Phase.CLIP  # its stage is that of `GradNorm`

    def __init__(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> None:
        self.max_norm = check_range("max_norm", max_norm, 0, above=True, finite=False)
        if norm_type not in (2, math.inf, "inf"):
            raise ValueError(f"norm_type must be 2 or math.inf, got {norm_type=}")
        self.norm_type = float(norm_type)
        self.error_if_nonfinite = check_flag("error_if_nonfinite", error_if_nonfinite)


class ClipValue(Component):
    """Clips every element of the gradient: g ← min(max(g, -clip_value), clip_value).

    As `torch.nn.utils.clip_grad_value_`, in registers; after `ClipNorm` where both are given.

    Args:
        clip_value: Largest absolute value, in units of the gradient; ≥ 0.

    Raises:
        ValueError: If clip_value is negative or not finite.

    Reference:
        Mikolov 2012, "Statistical language models based on neural networks".
    """

    phase = Phase.CLIP
    _stage = Stage("regularizers.clip_value", reference.clip_value, step_scalars=2)

    def __init__(self, clip_value: float) -> None:
        self.clip_value = check_range("clip_value", clip_value, 0)

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """Returns the upper and the lower limit."""
        return self.clip_value, -self.clip_value


class AdaptiveClip(Component):
    """Adaptive gradient clipping: no unit's gradient is larger than a share of its weights.

    g ← g · min(clipping · max(‖p‖, eps) / ‖g‖, 1) for every unit: a row of a matrix, an output channel of a
    convolution, the whole of a vector.  Norms are of the gradient as it is after unscaling and `ClipNorm`.

    Args:
        clipping: Largest ratio λ of the norms; > 0.
        eps: Norms of weights below eps count as eps, so that units of zeros can still learn; > 0.

    Raises:
        ValueError: If clipping or eps is not positive and finite.

    Reference:
        Brock, De, Smith, Simonyan 2021, "High-performance large-scale image recognition without
        normalization".
    """

    phase = Phase.CLIP
    _name = "adaptive_clip"
    _stage = Stage("regularizers.scale", reference.scale, units=(_name,))

    def __init__(self, clipping: float = 0.01, eps: float = 1e-3) -> None:
        self.clipping = check_range("clipping", clipping, 0, above=True)
        self.eps = check_range("eps", eps, 0, above=True)

    def prepare(self, plan: Plan) -> None:
        """Computes the factor of each unit, in one read of weights and gradients."""
        for batch in plan.batches:
            squares = unit_squares(batch)
            if batch.shards is not None:
                self._reduce_vectors(squares, batch, batch.shards)
            weight, gradient = squares.sqrt().unbind(1)
            if batch.device in plan.measured:
                gradient = gradient * plan.measured[batch.device].factor.to(gradient.dtype)
            largest = self.clipping * weight.clamp(min=self.eps)
            batch.unit(self._name).copy_((largest / gradient.clamp(min=1e-30)).clamp(max=1.0))

    @staticmethod
    def _reduce_vectors(squares: Tensor, batch: Batch, shards: Shards) -> None:
        """Sums vectors over shards: each is one unit with parts in all of them, while rows lie in one."""
        counts = [units.count for units in batch.unit_layouts]
        starts = [sum(counts[:i]) for i, p in enumerate(batch.parameters) if p.dim() < 2]
        if starts:
            index = torch.tensor(starts, device=squares.device)
            parts = squares[index]
            shards.all_reduce(parts)
            squares[index] = parts


class GradientNoise(Component):
    """Adds Gaussian noise to the gradient after clipping: g ← g + σ · N(0, 1).

    σ is `std` at first, and falls where `gamma` is given: σ² = std² / (1 + t)^γ after t steps.  With
    `relative=True` the noise of all elements together has, on average, `std` times the norm of all
    gradients, after clipping: σ is std · ‖g‖ / √n.

    The noise is a function of the optimizer's `seed`, the position of the parameter in the optimizer, its
    step count and the element index: the same on every backend and for every sharding.  Replicas that hold
    whole copies of a parameter (DDP) must be given the same `seed`.

    Args:
        std: Standard deviation, in units of the gradient, or a share of its norm; ≥ 0.
        gamma: How fast the noise is annealed, ≥ 0; 0.55 in the paper, with std = √η, η of 0.01, 0.3 or 1.
        relative: Whether `std` is a share.

    Raises:
        ValueError: If std or gamma is negative or not finite.

    Reference:
        Neelakantan et al. 2015, "Adding gradient noise improves learning for very deep networks".
    """

    phase = Phase.NOISE
    reads_gradients = False  # it takes the norm from GradNorm
    _absolute = Stage(
        "regularizers.gradient_noise", reference.gradient_noise, rng_keys=("key",), step_scalars=1
    )
    _relative = Stage(
        "regularizers.relative_noise", reference.relative_noise,
        device_scalars=("size",), rng_keys=("key",), step_scalars=1,
    )  # fmt: skip

    def __init__(self, std: float, gamma: float = 0.0, relative: bool = False) -> None:
        self.std, self.gamma = check_range("std", std, 0), check_range("gamma", gamma, 0)
        self._is_relative = check_flag("relative", relative)
        self._sizes = DeviceScalars(0.0)

    @property
    def relative(self) -> bool:
        """Whether `std` is a share of the norm of all gradients."""
        return self._is_relative

    @property
    def needs_norm(self) -> bool:
        """Whether it reads the norm, as relative noise does."""
        return self.relative

    def stage(self, group: dict[str, Any]) -> Stage:
        """Returns the stage for absolute or relative noise."""
        return self._relative if self._is_relative else self._absolute

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """Returns the standard deviation at a step."""
        return (self.std * step ** (-self.gamma / 2),)

    def rng_keys(self, seed: int) -> tuple[int, ...]:
        """Returns the random key of this noise."""
        return (key(seed, Purpose.GRADIENT_NOISE),)

    def device_scalars(self, device: torch.device) -> tuple[Tensor, ...]:
        """Returns ‖g‖ / √n for relative noise."""
        return (self._sizes[device],) if self.relative else ()

    def prepare(self, plan: Plan) -> None:
        """Computes the size of relative noise from the norm."""
        if self._is_relative:
            for device, measured in plan.measured.items():
                torch.mul(measured.clipped, max(plan.elements, 1) ** -0.5, out=self._sizes[device])


class L2SP(Component):
    """Pulls weights towards where they started, or towards given weights: g ← g + strength · (p - p₀).

    For fine-tuning: forgets less of what was learned before than decay towards zero does.  The starting
    point is held in the state of each parameter, in its own dtype.

    Args:
        strength: α of the penalty α/2 · ‖p - p₀‖²; ≥ 0.
        towards: One tensor for each parameter of the optimizer, in its order, such as
            `pretrained.parameters()`; by default each parameter as it is before its first step.

    Raises:
        ValueError: If strength is negative or not finite.

    Reference:
        Li, Grandvalet, Davoine 2018, "Explicit inductive bias for transfer learning with convolutional
        networks".
    """

    phase = Phase.PENALTY
    _start = Buffer("l2_sp_start", "parameter", "parameter")
    _stage = Stage("regularizers.l2_sp", reference.l2_sp, (_start,), step_scalars=1)

    def __init__(self, strength: float, towards: Iterable[Tensor] | None = None) -> None:
        self.strength = check_range("strength", strength, 0)
        self._towards: list[Tensor] | None = None
        if towards is not None:
            self._towards = [t.detach() for t in check_tensors("towards", towards, "model.parameters()")]

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """Returns the strength of the penalty."""
        return (self.strength,)

    def initial(self, name: str, index: int, parameter: Tensor) -> Tensor | None:
        """Returns the weight to pull a parameter towards; `ValueError` if it is missing or does not fit."""
        if self._towards is None:
            return None
        if index >= len(self._towards) or self._towards[index].shape != parameter.shape:
            shape = tuple(self._towards[index].shape) if index < len(self._towards) else "nothing"
            raise ValueError(
                f"towards must hold a tensor for each parameter of the optimizer, in its order: "
                f"number {index} has shape {tuple(parameter.shape)}, got {shape}"
            )
        return self._towards[index]


class L1(Component):
    """Drives weights to exact zeros: p ← sign(p) · max(|p| - lr · strength, 0) after the update.

    The proximal step of the penalty strength · ‖p‖₁, beside the update like decoupled weight decay.

    Args:
        strength: Strength of the penalty; ≥ 0.

    Raises:
        ValueError: If strength is negative or not finite.

    Reference:
        Tibshirani 1996, "Regression shrinkage and selection via the lasso"; Daubechies, Defrise, De Mol 2004,
        "An iterative thresholding algorithm for linear inverse problems with a sparsity constraint".
    """

    phase = Phase.PROXIMAL
    _stage = Stage("regularizers.l1", reference.l1, step_scalars=1)

    def __init__(self, strength: float) -> None:
        self.strength = check_range("strength", strength, 0)

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """Returns the threshold of this step."""
        (lr,) = values(group, step, "lr")
        return (lr * self.strength,)
