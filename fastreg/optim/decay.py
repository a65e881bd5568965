"""Weight decay in its four kinds, as components: one of the two below is at work in a group.

| kind            |                                      | source                      |
|-----------------|--------------------------------------|-----------------------------|
| `"l2"`          | g ← g + λ · p                        | Hanson & Pratt 1988         |
| `"decoupled"`   | p ← p - lr · λ · p                   | Loshchilov & Hutter 2019    |
| `"independent"` | p ← p - lr / lr_max · λ · p          | ibid., λ apart from the lr  |
| `"cautious"`    | p ← p - lr · λ · p where u · p ≥ 0   | Chen et al. 2025            |
"""

from typing import Any

from ..common.validation import check_choice
from ..engine.component import Component, Phase
from ..engine.stage import Stage
from ..reference import regularizers as reference
from .rules import values

KINDS = ("l2", "decoupled", "independent", "cautious")


class Decay(Component):
    """Base of `Penalty` and `Shrinkage`: finds the kind of decay of a group.

    `kind` is that of groups without a `decay`; `None`: what torch's `decoupled_weight_decay` says.
    """

    def __init__(self, kind: str | None) -> None:
        self.kind = kind

    def _kind(self, group: dict[str, Any]) -> str | None:
        if "weight_decay" not in group:
            return None
        kind = group.get("decay", self.kind)
        if kind is None:
            return "decoupled" if group.get("decoupled_weight_decay") else "l2"
        check_choice("decay", kind, KINDS)
        return kind


class Penalty(Decay):
    """Kind `"l2"`: adds `weight_decay` · p to the gradient, as torch's SGD and Adam do.

    With `at_zero` it takes part also where the rate is 0, so that groups that differ only there share a
    launch; not with MSAM, whose norm would read the weights even for a rate of 0.
    """

    phase = Phase.PENALTY
    _stage = Stage("regularizers.l2_decay", reference.l2_decay, step_scalars=1)

    def __init__(self, kind: str | None, at_zero: bool = True) -> None:
        super().__init__(kind)
        self._at_zero = at_zero

    def stage(self, group: dict[str, Any]) -> Stage | None:
        """Returns the stage if the group has this kind."""
        return self._stage if self._kind(group) == "l2" and (self._at_zero or group["weight_decay"]) else None

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """Returns the rate of the decay."""
        return values(group, step, "weight_decay")


class Shrinkage(Decay):
    """The other kinds: scales the weight, beside the update."""

    phase = Phase.DECAY
    _everywhere = Stage("regularizers.decoupled_decay", reference.decoupled_decay, step_scalars=1)
    _cautious = Stage("regularizers.cautious_decay", reference.cautious_decay, step_scalars=1)

    def stage(self, group: dict[str, Any]) -> Stage | None:
        """Returns the stage, also for a rate of 0, so that groups that differ only there share a launch."""
        kind = self._kind(group)
        return None if kind in (None, "l2") else self._cautious if kind == "cautious" else self._everywhere

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """Returns the share of the weight that stays: a factor, since torch rounds at the same place."""
        lr, rate = values(group, step, "lr", "weight_decay")
        if self._kind(group) == "independent":
            # Schedulers that rise above the first learning rate set `max_lr`.
            largest = max(group["lr_max"], float(group.get("max_lr", 0)))
            return (1 - (lr / largest if largest else 0 * lr) * rate,)
        return (1 - lr * rate,)
