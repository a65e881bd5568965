"""Defines the update rules as components, and the descent at the end of the update."""

from typing import Any

from torch import Tensor

from ..engine.component import Component, Phase
from ..engine.stage import Buffer, Stage
from ..reference import regularizers as reference_regularizers
from ..reference import rules as reference


class Adam(Component):
    """Adam's update with bias correction; reads `lr`, `betas`, `eps` and `amsgrad` of the group."""

    phase = Phase.RULE
    _moments = Buffer("exp_avg"), Buffer("exp_avg_sq")
    _plain = Stage("rules.adam", reference.adam, _moments, step_scalars=6)
    _amsgrad = Stage(
        "rules.adam_amsgrad", reference.adam_amsgrad, (*_moments, Buffer("max_exp_avg_sq")), step_scalars=6
    )

    def stage(self, group: dict[str, Any]) -> Stage:
        """Returns the stage, which has one more buffer for AMSGrad."""
        return self._amsgrad if group.get("amsgrad") else self._plain

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """Returns 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1ᵗ), 1 / √(1 - beta2ᵗ), eps."""
        beta1, beta2 = betas(group, step)
        lr, eps = values(group, step, "lr", "eps")
        return 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, eps


class SGD(Component):
    """Gradient descent; reads `lr`, `momentum`, `dampening` and `nesterov` of the group."""

    phase = Phase.RULE
    _buffers = (Buffer("momentum_buffer"),)
    _plain = Stage("rules.sgd", reference.sgd, step_scalars=1)
    _momentum = Stage("rules.sgd_momentum", reference.sgd_momentum, _buffers, step_scalars=3)
    _nesterov = Stage("rules.sgd_nesterov", reference.sgd_nesterov, _buffers, step_scalars=4)

    def stage(self, group: dict[str, Any]) -> Stage:
        """Returns the stage, which has no buffer without momentum."""
        if not group["momentum"]:
            return self._plain
        return self._nesterov if group["nesterov"] else self._momentum

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """Returns lr; with momentum: momentum, 1 - dampening, lr; with Nesterov's also lr · momentum."""
        lr, momentum, dampening = values(group, step, "lr", "momentum", "dampening")
        if not group["momentum"]:
            return (lr,)
        # The buffer starts as the undamped gradient.
        later = (step > 1).to(step.dtype) if isinstance(step, Tensor) else float(step > 1)
        keep, take = momentum * later, 1 - dampening * later
        return (keep, take, lr, lr * momentum) if group["nesterov"] else (keep, take, lr)


class Lion(Component):
    """The sign of an interpolated momentum; reads `lr` and `betas` of the group."""

    phase = Phase.RULE
    _stage = Stage("rules.lion", reference.lion, (Buffer("exp_avg"),), step_scalars=5)

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """Returns beta1, 1 - beta1, beta2, 1 - beta2, lr."""
        beta1, beta2 = betas(group, step)
        return beta1, 1 - beta1, beta2, 1 - beta2, *values(group, step, "lr")


class Maximize(Component):
    """Negates the gradient in groups with `maximize`."""

    phase = Phase.CLIP
    _stage = Stage("regularizers.negate", reference_regularizers.negate)

    def stage(self, group: dict[str, Any]) -> Stage | None:
        """Returns `None` unless the group maximizes."""
        return self._stage if group.get("maximize") else None


class Descend(Component):
    """Subtracts the update from the weight, in all optimizers; for MSAM it has the `momentum` beside it."""

    phase = Phase.DESCEND
    _plain = Stage("rules.descend", reference.descend)
    _with_momentum = Stage("rules.descend_with_momentum", reference.descend_with_momentum)

    def __init__(self, momentum: bool = False) -> None:
        self._stage = self._with_momentum if momentum else self._plain


def values(group: dict[str, Any], step: Any, *names: str) -> tuple[Any, ...]:
    """Returns options of a group for `step_scalars`: floats, or double tensors where the device counts."""
    if isinstance(step, Tensor):
        return tuple(_double(group[name]) for name in names)
    return tuple(float(group[name]) for name in names)


def betas(group: dict[str, Any], step: Any) -> tuple[Any, Any]:
    """Returns the two betas of a group in the same way as `values`."""
    first, second = group["betas"]
    return (_double(first), _double(second)) if isinstance(step, Tensor) else (float(first), float(second))


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value
