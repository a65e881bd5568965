"""Lookahead as a component: slow weights that follow the fast ones every k steps."""

from typing import Any

import torch
from torch import Tensor

from ..common.validation import check_choice, check_int, check_name, check_range
from ..engine.component import Phase
from ..engine.plan import Plan
from ..engine.stage import Buffer, Stage
from ..reference import regularizers as reference
from .weight_averages import FIRST_MOMENTS, Average


class SlowWeights(Average):
    """Lookahead as a component: every k steps slow ← slow + alpha · (p - slow), p ← slow.

    Slow weights are kept in float32 (float64 for float64 parameters); they start as the parameter before its
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
    reads_gradients = False

    def __init__(
        self, k: int = 5, alpha: float = 0.5, pullback_momentum: str = "none", name: str = "slow"
    ) -> None:
        check_choice("pullback_momentum", pullback_momentum, ("none", "reset", "pullback"))
        self.k, self.alpha = check_int("k", k, 1), check_range("alpha", alpha, 0, 1)
        self.pullback_momentum, self.name = pullback_momentum, check_name(name)
        slow, moment = Buffer(name, "compute", "parameter"), Buffer("slow_momentum", "compute")
        self.slow_buffer = slow
        self._stage = Stage("regularizers.lookahead", reference.lookahead, (slow,), step_scalars=2)
        if pullback_momentum == "pullback":
            kernel, maths = "regularizers.lookahead_pullback", reference.lookahead_pullback
            self._stage = Stage(kernel, maths, (slow, moment), step_scalars=2)

    def options(self) -> dict[str, Any]:
        """Returns k and alpha, which groups may change."""
        return {"lookahead_k": self.k, "lookahead_alpha": self.alpha}

    def due(self, group: dict[str, Any], step: int) -> bool:
        """Returns whether a step is a k-th."""
        return step % group["lookahead_k"] == 0

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """Returns alpha, and whether the step is a k-th: both 0 if not."""
        alpha = float(group["lookahead_alpha"])
        if not isinstance(step, Tensor):
            return alpha, 1.0
        due = (step % group["lookahead_k"] == 0).to(step.dtype)
        return alpha * due, due

    def finish(self, plan: Plan, flags: dict[torch.device, Tensor]) -> None:
        """Resets or pulls back first moments; where the device counts or skips, by its own scalars."""
        if self.pullback_momentum == "none":
            return
        for batch in plan.batches:
            if self._stage not in batch.chain.stages:
                continue
            buffers = dict(zip((buffer.name for buffer in batch.chain.buffers), batch.buffers, strict=True))
            before = batch.chain.stages[: batch.chain.stages.index(self._stage)]
            column = sum(stage.step_scalars for stage in before)
            for i, row in enumerate(batch.rows):
                alpha, sync = batch.step_scalars[row][column], batch.step_scalars[row][column + 1]
                if (flag := flags.get(batch.device)) is not None:
                    taken = 1 - flag[0]
                    alpha, sync = alpha * taken, sync * taken
                slow = buffers["slow_momentum"][i] if "slow_momentum" in buffers else None
                for name in buffers.keys() & set(FIRST_MOMENTS):
                    self.pull_back(buffers[name][i], slow, alpha, sync)

    def pull_back(self, moment: Tensor, slow: Tensor | None, alpha: Any, sync: Any) -> None:
        """Pulls a first moment back to a slow one, which goes the share `alpha`; without one, resets it.

        `sync` is 1, or 0 to leave the moment as it is.
        """
        if slow is None:
            moment.mul_(1 - sync)
        else:
            slow.add_((moment.to(slow.dtype) - slow) * alpha)
            moment.add_((slow.to(moment.dtype) - moment) * sync)
