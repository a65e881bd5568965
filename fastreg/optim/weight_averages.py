"""Averages of the weights, updated in the step and evaluated with: EMA and SWA."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..common.validation import check_choice, check_int, check_name, check_range, check_tensors
from ..engine.component import Component, Phase
from ..engine.plan import Plan
from ..engine.stage import Buffer, Stage
from ..reference import regularizers as reference
from ..reference.step import compute_dtype

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")


class ModuleBuffers:
    """Averages of buffers of modules, such as running statistics; those not floating-point are copied."""

    def __init__(self, buffers: Iterable[Tensor] = ()) -> None:
        self._buffers = list(buffers)
        self._averages = [
            b.detach().to(compute_dtype(b.dtype) if b.is_floating_point() else b.dtype, copy=True)
            for b in self._buffers
        ]
        self._kept: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._buffers)

    @torch.no_grad()
    def update(self, weight: Any) -> None:
        """Updates all averages: average ← average + weight · (buffer - average)."""
        for average, buffer in zip(self._averages, self._buffers, strict=True):
            if average.is_floating_point() and not (isinstance(weight, float) and weight >= 1):
                average.add_((buffer.to(average.dtype) - average) * weight)
            else:
                average.copy_(buffer)

    @torch.no_grad()
    def swap_in(self) -> None:
        """Lets the buffers hold their averages."""
        self._kept = [buffer.detach().clone() for buffer in self._buffers]
        for buffer, average in zip(self._buffers, self._averages, strict=True):
            buffer.copy_(average)

    @torch.no_grad()
    def swap_out(self) -> None:
        """Lets the buffers hold again what they held before."""
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(kept)
        self._kept = []

    def state(self) -> dict[str, list[Tensor]]:
        """Returns the averages, and the buffers that are swapped out for them now."""
        return {"averages": self._averages, "kept": self._kept}

    @torch.no_grad()
    def load(self, state: dict[str, list[Tensor]]) -> None:
        """Loads a `state` to the devices of the buffers; `ValueError` if it is that of others."""
        shapes = [b.shape for b in self._buffers]
        if [a.shape for a in state["averages"]] != shapes:
            raise ValueError(
                f"the saved averages are of {len(state['averages'])} buffers, not of these {shapes}"
            )
        self._averages, self._kept = (
            [t.to(b.device, copy=True) for t, b in zip(state[key], self._buffers, strict=False)]
            for key in ("averages", "kept")
        )


class Average(Component):
    """Base of components whose averages weights can be evaluated with."""

    name: str
    computed = False
    """Whether `value` computes it from weight and state; if not, it is a buffer called `name`."""

    module_buffers = ModuleBuffers()
    """Buffers of modules that are averaged and swapped with the weights."""

    def begun(self, step: int) -> bool:
        """Returns whether there is an average after this many steps of a parameter."""
        return True

    def value(self, parameter: Tensor, state: dict[str, Any]) -> Tensor:
        """Returns the average: by default the buffer called `name`."""
        return state[self.name]


def dither(updates: Any) -> Any:
    """Returns the dither that `reference.approach` adds at an update."""
    # Multiples of the golden ratio are spread most evenly.
    return ((updates + 1) * 0.6180339887498949 % 1 - 0.5) * 2.0**-23


class _Buffered(Average):
    """An average in one buffer, which starts at step `start` and is updated at regular intervals."""

    phase = Phase.AVERAGE
    reads_gradients = False

    def __init__(self, name: str, start: int, every: int, buffers: Iterable[Tensor] | None) -> None:
        self.name, self.start, self.every = check_name(name), start, check_int("every", every, 1)
        average = Buffer(name, "compute", "parameter")
        self._stage = Stage("regularizers.average", reference.average, (average,), step_scalars=2)
        averaged = () if buffers is None else check_tensors("buffers", buffers, "model.buffers()")
        self.module_buffers = ModuleBuffers(averaged)

    def due(self, group: dict[str, Any], step: int) -> bool:
        return step >= self.start and (step - self.start) % self.every == 0

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        if not isinstance(step, Tensor):
            updates = (step - self.start) // self.every
            return self.weight(updates), dither(updates)
        since = step - self.start
        updates = torch.div(since, self.every, rounding_mode="floor").clamp(min=0)
        due = (since >= 0) & (since % self.every == 0)
        return self.weight(updates) * due, dither(updates) * due

    def weight(self, updates: Any) -> Any:
        """Returns the weight of the new parameter after so many updates; for a tensor of them, a tensor."""
        raise NotImplementedError

    def begun(self, step: int) -> bool:
        return step >= self.start

    def finish(self, plan: Plan, flags: dict[torch.device, Tensor]) -> None:
        if not self.module_buffers:
            return
        batch = plan.batches[0]
        steps: Any = max(batch.steps) if isinstance(batch.steps, list) else batch.steps.double().amax()
        if isinstance(steps, Tensor) or self.due({}, steps):
            weight, _ = self.step_scalars({}, steps)
            flag = next(iter(flags.values()), None)
            self.module_buffers.update(weight if flag is None else weight * (1 - flag[0]))

    def save(self, groups: list[dict[str, Any]]) -> None:
        if self.module_buffers:
            groups[0][f"{self.name}_buffers"] = self.module_buffers.state()

    def load(self, groups: list[dict[str, Any]]) -> None:
        if self.module_buffers and f"{self.name}_buffers" in groups[0]:
            self.module_buffers.load(groups[0][f"{self.name}_buffers"])


class EMA(_Buffered):
    """Exponential moving average of the weights: average ← average + (1 - decay)(p - average).

    It is kept in float32 (float64 for float64 parameters) under `name` in the state of each parameter,
    whatever the parameter's dtype is, from the weight before it is rounded.
    `with optimizer.averaged():` evaluates with it, as does everything between `optimizer.eval()` and
    `optimizer.train()`.

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
            weights.  By default buffers are not averaged.

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
        super().__init__(name, check_int("start", start, 0), every, buffers)
        check_choice("warmup", warmup, (None, "ratio", "power"))
        self.decay, self.warmup = check_range("decay", decay, 0, 1, below=True), warmup
        self.min_decay = check_range("min_decay", min_decay, 0, decay)
        self.gamma = check_range("gamma", gamma, 0, above=True)
        self.power = check_range("power", power, 0, above=True)

    def weight(self, updates: Any) -> Any:
        """Returns 1 - decay, or 1 at the first update of an average that starts later."""
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

    It is kept like an `EMA`.  Until it starts, `averaged()` and `eval()` leave a parameter as it is.

    Args:
        start: The step whose weight is the first. It is counted for each parameter; ≥ 1.
        every: Steps between weights; ≥ 1.
        name: Key of the average, to tell several apart.
        buffers: As for `EMA`; for BatchNorm, `fastreg.update_bn` measures them anew instead.

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
        """Returns the share of one of n + 1 weights."""
        return 1 / (updates + 1)
