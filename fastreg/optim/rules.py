"""Update rules as pieces, and what every chain ends its update with."""

from __future__ import annotations

from typing import Any

from ..chain import Buffer, Stage
from ..reference import regularizers as reference_regularizers
from ..reference import rules as reference
from .piece import Phase, Piece, floats


class Adam(Piece):
    """Adam's update with bias correction; reads `lr`, `betas` and `eps` of the group."""

    phase = Phase.RULE
    _stage = Stage("rules.adam", reference.adam, (Buffer("exp_avg"), Buffer("exp_avg_sq")), numbers=6)

    def stage(self, group: dict[str, Any]) -> Stage:
        """Always the same."""
        return self._stage

    def numbers(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """1 - beta1, beta2, 1 - beta2, lr / (1 - beta1ᵗ), 1 / √(1 - beta2ᵗ), eps."""
        beta1, beta2 = map(float, group["betas"])
        lr, eps = floats(group, "lr", "eps")
        return 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, eps


class SGD(Piece):
    """Gradient descent; reads `lr`, `momentum`, `dampening` and `nesterov` of the group."""

    phase = Phase.RULE
    _plain = Stage("rules.sgd", reference.sgd, numbers=1)
    _momentum = Stage("rules.sgd_momentum", reference.sgd_momentum, (Buffer("momentum_buffer"),), numbers=3)
    _nesterov = Stage("rules.sgd_nesterov", reference.sgd_nesterov, (Buffer("momentum_buffer"),), numbers=4)

    def stage(self, group: dict[str, Any]) -> Stage:
        """Without momentum there is no buffer."""
        if not group["momentum"]:
            return self._plain
        return self._nesterov if group["nesterov"] else self._momentum

    def numbers(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """lr; with momentum: momentum, 1 - dampening, lr; with Nesterov's also lr · momentum."""
        lr, momentum, dampening = floats(group, "lr", "momentum", "dampening")
        if not momentum:
            return (lr,)
        # The buffer starts as the undamped gradient.
        keep, take = (0.0, 1.0) if step == 1 else (momentum, 1 - dampening)
        return (keep, take, lr, lr * momentum) if group["nesterov"] else (keep, take, lr)


class Lion(Piece):
    """The sign of an interpolated momentum; reads `lr` and `betas` of the group."""

    phase = Phase.RULE
    _stage = Stage("rules.lion", reference.lion, (Buffer("exp_avg"),), numbers=5)

    def stage(self, group: dict[str, Any]) -> Stage:
        """Always the same."""
        return self._stage

    def numbers(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """beta1, 1 - beta1, beta2, 1 - beta2, lr."""
        beta1, beta2 = map(float, group["betas"])
        return beta1, 1 - beta1, beta2, 1 - beta2, float(group["lr"])


class L2Decay(Piece):
    """Adds `weight_decay` · p to the gradient, as torch's SGD and Adam do."""

    phase = Phase.PENALTY
    _stage = Stage("regularizers.l2_decay", reference_regularizers.l2_decay, numbers=1)

    def stage(self, group: dict[str, Any]) -> Stage:
        """Also where the rate is 0, so that groups that differ only there share a launch."""
        return self._stage

    def numbers(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """The rate."""
        return floats(group, "weight_decay")


class DecoupledDecay(Piece):
    """Multiplies p by 1 - lr · `weight_decay` beside the update, as torch's AdamW does."""

    phase = Phase.DECAY
    _stage = Stage("regularizers.decoupled_decay", reference_regularizers.decoupled_decay, numbers=1)

    def stage(self, group: dict[str, Any]) -> Stage:
        """Also where the rate is 0, so that groups that differ only there share a launch."""
        return self._stage

    def numbers(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """The share of the weight that stays: as a factor, since torch rounds at the same place."""
        lr, rate = floats(group, "lr", "weight_decay")
        return (1 - lr * rate,)


class Descend(Piece):
    """Takes the update off the weight; every optimizer has it."""

    phase = Phase.DESCEND
    _stage = Stage("rules.descend", reference.descend)

    def stage(self, group: dict[str, Any]) -> Stage:
        """Always the same."""
        return self._stage


DECAYS = {"l2": L2Decay, "decoupled": DecoupledDecay}


def decay_piece(kind: str) -> Piece:
    """The piece for a `decay=` keyword.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind not in DECAYS:
        raise ValueError(f"decay must be one of {', '.join(map(repr, DECAYS))}, got {kind!r}")
    return DECAYS[kind]()
