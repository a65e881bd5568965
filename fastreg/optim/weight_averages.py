"""Averages of the weights, kept in the step and evaluated with: EMA, SWA, Lookahead's slow weights.

While an average is shown, parameters hold it and `SHOWN` in every group says which.  What is trained is
kept under `TRAINED` in the state meanwhile: in the memory of the average where both have one dtype, in a copy
where parameters are narrower.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.validation import check_int, check_range
from ..engine import layout
from ..engine.component import Component, Phase, Work
from ..engine.stage import Buffer, Stage
from ..reference import regularizers as reference
from ..reference.step import compute_dtype

if TYPE_CHECKING:
    from ..engine.multi_tensor_optimizer import MultiTensorOptimizer

SHOWN = "averaged"
TRAINED = "trained_weight"
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")


class Average(Component):
    """Base of what weights can be evaluated with."""

    name: str
    computed = False
    """Whether it follows from weight and state, instead of being a buffer called `name`."""

    def begun(self, step: int) -> bool:
        """Whether there is an average after this many steps of a parameter."""
        return True

    def shown(self, parameter: Tensor, state: dict[str, Any]) -> Tensor:
        """What to evaluate with: by default the buffer called `name`."""
        return state[self.name]

    def show_buffers(self) -> None:
        """Let module buffers hold their averages, where there are any."""

    def hide_buffers(self) -> None:
        """Let them hold what they held before."""


def dither(updates: Any) -> Any:
    """What `reference.approach` adds at an update: multiples of the golden ratio are spread most evenly."""
    return ((updates + 1) * 0.6180339887498949 % 1 - 0.5) * 2.0**-23


class _Buffered(Average):
    """Averages of one buffer, `start` and `every`."""

    phase = Phase.AVERAGE

    def __init__(self, name: str, start: int, every: int, buffers: Iterable[Tensor] | None) -> None:
        self.name, self.start, self.every = name, start, check_int("every", every, 1)
        held = (Buffer(name, "compute", "parameter"),)
        self._stage = Stage("regularizers.average", reference.average, held, step_scalars=2)
        self._modules = None if buffers is None else ModuleBuffers(buffers)

    def stage(self, group: dict[str, Any]) -> Stage:
        """The average is its one buffer."""
        return self._stage

    def due(self, group: dict[str, Any], step: int) -> bool:
        """Every so many steps."""
        return step >= self.start and (step - self.start) % self.every == 0

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """The weight of the new parameter, and a dither."""
        if not isinstance(step, Tensor):
            updates = (step - self.start) // self.every
            return self.weight(updates), dither(updates)
        since = step - self.start
        updates = torch.div(since, self.every, rounding_mode="floor").clamp(min=0)
        due = (since >= 0) & (since % self.every == 0)
        return self.weight(updates) * due, dither(updates) * due

    def weight(self, updates: Any) -> Any:
        """The weight of the new parameter after so many updates; for tensors of them, a tensor."""
        raise NotImplementedError

    def begun(self, step: int) -> bool:
        """From the first update on."""
        return step >= self.start

    def finish(self, work: Work, flags: dict[torch.device, Tensor]) -> None:
        """Average the buffers of the modules as the weights have been."""
        if self._modules is None:
            return
        batch = work.batches[0][0]
        steps: Any = max(batch.steps) if isinstance(batch.steps, list) else batch.steps.double().amax()
        if isinstance(steps, Tensor) or self.due({}, steps):
            weight, _ = self.step_scalars({}, steps)
            flag = next(iter(flags.values()), None)
            self._modules.update(weight if flag is None else weight * (1 - flag[0]))

    def show_buffers(self) -> None:
        """Let module buffers hold their averages."""
        if self._modules is not None:
            self._modules.show()

    def hide_buffers(self) -> None:
        """Let them hold what they held before."""
        if self._modules is not None:
            self._modules.hide()

    def save(self, groups: list[dict[str, Any]]) -> None:
        """The averages of module buffers."""
        if self._modules is not None:
            groups[0][f"{self.name}_buffers"] = self._modules.state()

    def load(self, groups: list[dict[str, Any]]) -> None:
        """Likewise."""
        if self._modules is not None and f"{self.name}_buffers" in groups[0]:
            self._modules.load(groups[0][f"{self.name}_buffers"])


class ModuleBuffers:
    """Averages of the buffers of modules, such as the running statistics of BatchNorm.

    Args:
        buffers: The buffers; those that are not floating-point are copied.
    """

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        self._buffers = list(buffers)
        self._averages = [
            b.detach().to(compute_dtype(b.dtype) if b.is_floating_point() else b.dtype, copy=True)
            for b in self._buffers
        ]
        self._kept: list[Tensor] = []

    @torch.no_grad()
    def update(self, weight: Any) -> None:
        """average ← average + weight · (buffer - average)."""
        for average, buffer in zip(self._averages, self._buffers, strict=True):
            if average.is_floating_point() and not (isinstance(weight, float) and weight >= 1):
                average.add_((buffer.to(average.dtype) - average) * weight)
            else:
                average.copy_(buffer)

    @torch.no_grad()
    def show(self) -> None:
        """Let the buffers hold their averages."""
        self._kept = [buffer.detach().clone() for buffer in self._buffers]
        for buffer, average in zip(self._buffers, self._averages, strict=True):
            buffer.copy_(average)

    @torch.no_grad()
    def hide(self) -> None:
        """Let them hold what they held before."""
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(kept)
        self._kept = []

    def state(self) -> dict[str, list[Tensor]]:
        """What is saved."""
        return {"averages": self._averages, "kept": self._kept}

    @torch.no_grad()
    def load(self, state: dict[str, list[Tensor]]) -> None:
        """Take it over, on the devices where the buffers are.

        Raises:
            ValueError: If it is of other buffers.
        """
        shapes = [b.shape for b in self._buffers]
        if [a.shape for a in state["averages"]] != shapes:
            raise ValueError(
                f"the saved averages are of {len(state['averages'])} buffers, not of these {shapes}"
            )
        self._averages, self._kept = (
            [t.to(b.device, copy=True) for t, b in zip(state[key], self._buffers, strict=False)]
            for key in ("averages", "kept")
        )


class EMA(_Buffered):
    """Exponential moving average of the weights: average ← average + (1 - decay)(p - average).

    Kept in float32 (float64 for float64 parameters) under `name` in the state of each parameter, whatever
    the parameter's dtype is, from the weight before it is rounded.  `with optimizer.averaged():` evaluates
    with it, as does everything between `optimizer.eval()` and `optimizer.train()`.

    It starts as the weight after `start` steps, counted for each parameter: with 0, before the first.

    Args:
        decay: Share of the average that is kept at each update; 0 ≤ decay < 1.
        name: Key of the average, to tell several apart.
        start: Steps before it starts; ≥ 0.
        every: Steps between updates; ≥ 1.
        warmup: How the decay grows to `decay`, after t updates: `None` not at all; `"ratio"`:
            (1 + t) / (10 + t); `"power"`: 1 - (1 + t / gamma)^-power, which reaches 0.999 after 31,622
            updates with 2/3, after 10,000 with 3/4.
        gamma: For `"power"`, in updates; > 0.
        power: For `"power"`; > 0.  With gamma and power of 1, the plain mean.
        min_decay: Least decay, ≤ decay.
        buffers: Buffers of modules to average as well, such as `model.buffers()`; they are swapped with the
            weights.  By default the model's own, as they are, serve the averages, too.

    Raises:
        ValueError: For values out of range.

    Reference:
        Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging".
    """

    def __init__(
        self, decay: float = 0.999, name: str = "ema", *, start: int = 0, every: int = 1,
        warmup: str | None = None, gamma: float = 1.0, power: float = 2 / 3, min_decay: float = 0.0,
        buffers: Iterable[Tensor] | None = None,
    ) -> None:  # fmt: skip
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay=}")
        if warmup not in (None, "ratio", "power"):
            raise ValueError(f"warmup must be None, 'ratio' or 'power', got {warmup=}")
        if not 0 <= min_decay <= decay:
            raise ValueError(f"min_decay must be in [0, decay], got {min_decay=}, {decay=}")
        super().__init__(name, check_int("start", start, 0), every, buffers)
        self.decay, self.warmup, self.min_decay = float(decay), warmup, float(min_decay)
        self.gamma = check_range("gamma", gamma, 0, above=True)
        self.power = check_range("power", power, 0, above=True)

    def weight(self, updates: Any) -> Any:
        """1 - decay; 1 where the average starts as a weight of its own."""
        t = updates - 1  # the first is the start
        if isinstance(updates, Tensor):
            weight = 1 - self._decay(t.clamp(min=0)).clamp(self.min_decay, self.decay)
            return torch.where(updates == 0, float(self.start > 0), weight)
        if updates == 0:
            return float(self.start > 0)
        return 1 - min(max(self._decay(t), self.min_decay), self.decay)

    def _decay(self, t: Any) -> Any:
        if self.warmup == "ratio":
            return (1 + t) / (10 + t)
        if self.warmup == "power":
            return 1 - (1 + t / self.gamma) ** -self.power
        return 0 * t + self.decay


class SWA(_Buffered):
    """Stochastic weight averaging: the plain mean of the weights after `start`, `start + every`, ... steps.

    Kept like an `EMA`.  Until it starts, `averaged()` and `eval()` leave a parameter as it is.

    Args:
        start: The step, counted for each parameter, whose weight is the first; ≥ 1.
        every: Steps between weights; ≥ 1.
        name: Key of the average, to tell several apart.
        buffers: As for `EMA`; for BatchNorm, `fastreg.update_bn` measures anew instead.

    Raises:
        ValueError: For values out of range.

    Reference:
        Izmailov et al. 2018, "Averaging weights leads to wider optima and better generalization".
    """

    def __init__(
        self, start: int = 1, every: int = 1, name: str = "swa", *, buffers: Iterable[Tensor] | None = None
    ) -> None:
        super().__init__(name, check_int("start", start, 1), every, buffers)

    def weight(self, updates: Any) -> Any:
        """Of n + 1 weights, one."""
        return 1 / (updates + 1)


class SlowWeights(Average):
    """Lookahead as a component: every k steps slow ← slow + alpha · (p - slow), p ← slow.

    Slow weights are held in float32 (float64 for float64 parameters); they start as the parameter before its
    first step.  `with optimizer.averaged():` evaluates with them.  `lookahead_k` and `lookahead_alpha` of a
    group may be changed, and are saved.

    Args:
        k: Steps between, counted for each parameter; ≥ 1.
        alpha: Share of the way that slow weights go; in [0, 1].
        pullback_momentum: What becomes of the first moment (`exp_avg`, `momentum_buffer`) then: `"none"`,
            `"reset"` to zero, or `"pullback"`: like the weights, towards a slow moment of its own.
        name: Key of the slow weights in the state.

    Raises:
        ValueError: For values out of range.

    Reference:
        Zhang, Lucas, Hinton, Ba 2019, "Lookahead optimizer: k steps forward, 1 step back".
    """

    phase = Phase.LOOKAHEAD

    def __init__(
        self, k: int = 5, alpha: float = 0.5, pullback_momentum: str = "none", name: str = "slow"
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha=}")
        if pullback_momentum not in ("none", "reset", "pullback"):
            raise ValueError(
                f"pullback_momentum must be 'none', 'reset' or 'pullback', got {pullback_momentum=}"
            )
        self.k, self.alpha = check_int("k", k, 1), float(alpha)
        self.pullback_momentum, self.name = pullback_momentum, name
        slow, moment = Buffer(name, "compute", "parameter"), Buffer("slow_momentum", "compute")
        self._stage = Stage("regularizers.lookahead", reference.lookahead, (slow,), step_scalars=2)
        if pullback_momentum == "pullback":
            self._stage = Stage(
                "regularizers.lookahead_pullback",
                reference.lookahead_pullback,
                (slow, moment),
                step_scalars=2,
            )

    def options(self) -> dict[str, Any]:
        """k and alpha."""
        return {"lookahead_k": self.k, "lookahead_alpha": self.alpha}

    def stage(self, group: dict[str, Any]) -> Stage:
        """Slow weights are its buffer."""
        return self._stage

    def due(self, group: dict[str, Any], step: int) -> bool:
        """Every k steps."""
        return step % group["lookahead_k"] == 0

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """alpha, and whether it is time."""
        alpha = float(group["lookahead_alpha"])
        if not isinstance(step, Tensor):
            return alpha, 1.0
        due = (step % group["lookahead_k"] == 0).to(step.dtype)
        return alpha * due, due

    def finish(self, work: Work, flags: dict[torch.device, Tensor]) -> None:
        """Take the first moments back; where the device counts or may skip, by as much as it says."""
        if self.pullback_momentum == "none":
            return
        for batch, _ in work.batches:
            held = dict(zip((buffer.name for buffer in batch.chain.buffers), batch.buffers, strict=True))
            if self.name in held:
                column = _number_column(batch.chain, self._stage)
                for i, row in enumerate(batch.rows):
                    alpha, sync = batch.step_scalars[row][column], batch.step_scalars[row][column + 1]
                    if (flag := flags.get(batch.device)) is not None:
                        keep = 1 - flag[0]
                        alpha, sync = alpha * keep, sync * keep
                    for name in held.keys() & set(FIRST_MOMENTS):
                        self._take_back(held[name][i], held.get("slow_momentum"), i, alpha, sync)

    def _take_back(self, moment: Tensor, slow: list[Tensor] | None, i: int, alpha: Any, sync: Any) -> None:
        if slow is None:
            moment.mul_(1 - sync)
        else:
            slow[i].add_((moment.to(slow[i].dtype) - slow[i]) * alpha)
            moment.add_((slow[i].to(moment.dtype) - moment) * sync)


def _number_column(chain: Any, wanted: Stage) -> int:
    """The first of the numbers of a stage."""
    column = 0
    for stage in chain.stages:
        if stage is wanted or stage == wanted:
            break
        column += stage.step_scalars
    return column


# Showing ------------------------------------------------------------------------------------------------


def all_of(optimizer: MultiTensorOptimizer) -> list[Average]:
    """The averages of an optimizer: those of the weights before Lookahead's, and what is computed last."""
    found = [component for component in optimizer.components if isinstance(component, Average)]
    return sorted(found, key=lambda component: (component.computed, isinstance(component, SlowWeights)))


def first(optimizer: MultiTensorOptimizer) -> Average | None:
    """What `eval()` shows."""
    return next(iter(all_of(optimizer)), None)


def find(optimizer: MultiTensorOptimizer, name: str | None) -> Average:
    """The average of this name, or the first.

    Raises:
        ValueError: If there is no such average.
    """
    found = {component.name: component for component in all_of(optimizer)}
    if not found:
        raise ValueError("averaged() needs an average: pass regularizers=[fastreg.EMA(0.999)]")
    if name is not None and name not in found:
        raise ValueError(f"no average is called {name!r}, only {', '.join(map(repr, found))}")
    return found[next(iter(found)) if name is None else name]


def shown(optimizer: MultiTensorOptimizer) -> str | None:
    """The name of the average that parameters hold now."""
    return optimizer.param_groups[0].get(SHOWN) if optimizer.param_groups else None


@torch.no_grad()
def show(optimizer: MultiTensorOptimizer, average: Average) -> None:
    """Let parameters hold an average."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            held = average.computed or average.name in state
            if held and average.begun(int(state.get("step", 0))):
                _show(p, state, average)
        group[SHOWN] = average.name
    layout.reshard(p for group in optimizer.param_groups for p in group["params"])
    average.show_buffers()


def _show(p: Tensor, state: dict[str, Any], average: Average) -> None:
    weight, trained = average.shown(p, state), p.detach().clone()
    p.copy_(weight)
    if not average.computed and weight.dtype == p.dtype:
        # The average is in the parameter now: its memory keeps the weight.
        trained, state[average.name] = weight.copy_(trained), p.detach()
    state[TRAINED] = trained


@torch.no_grad()
def hide(optimizer: MultiTensorOptimizer) -> None:
    """Let parameters hold again what is trained."""
    if (name := shown(optimizer)) is not None:
        find(optimizer, name).hide_buffers()
    for group in optimizer.param_groups:
        name = group.pop(SHOWN, None)
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if TRAINED not in state:
                continue
            trained, average = state.pop(TRAINED), state.get(name)
            if average is not None and average.data_ptr() == p.data_ptr():
                weight = trained.clone()
                state[name] = trained.copy_(average)
                trained = weight
            p.copy_(trained)
    layout.reshard(p for group in optimizer.param_groups for p in group["params"])
