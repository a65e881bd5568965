"""Lookahead around any optimizer: as a component of fastreg's, in a second pass around others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from ..engine import grad_scaler as amp
from ..engine import layout
from ..engine.multi_tensor_optimizer import Gradients
from ..engine.plan import Operands
from .slow_weights import SlowWeights
from .swap_averages import TRAINED, AveragingOptimizer
from .weight_averages import FIRST_MOMENTS
from .wrapper import Wrapper


class Lookahead(Wrapper):
    """Lookahead: every k steps slow weights follow the fast ones by a share, where these start again.

    Slow weights are kept in float32 (float64 for float64 parameters) and start as the parameters are now.
    `with optimizer.averaged():`, or `eval()` and `train()`, evaluate with them (with the first average of a
    fastreg optimizer that has one).  Around a fastreg optimizer a synchronisation costs 8 bytes a parameter
    in its pass, other steps nothing.

    Args:
        optimizer: Any optimizer.
        k: Steps between, ≥ 1; `lookahead_k` of the groups, which is saved.
        alpha: Share of the way that slow weights go, in [0, 1]; `lookahead_alpha` of the groups.
        pullback_momentum: What happens to the first moment then: `"none"`, `"reset"`, or `"pullback"`
            towards a slow moment.

    Raises:
        TypeError: If optimizer is no optimizer.
        ValueError: For values out of range, and if it has slow weights already.

    Reference:
        Zhang, Lucas, Hinton, Ba 2019, "Lookahead optimizer: k steps forward, 1 step back".
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        k: int = 5,
        alpha: float = 0.5,
        pullback_momentum: str = "none",
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {optimizer!r:.60}; "
                "write Lookahead(fastreg.AdamW(model.parameters()))"
            )
        component = SlowWeights(k, alpha, pullback_momentum)
        super().__init__(optimizer)
        self._sync: _Sync | None = None
        if self.fused_optimizer is not None:
            self.fused_optimizer.add_component(component)
        else:
            self._sync = _Sync(optimizer, component)
            self._complete()
        self._start()

    def options(self) -> dict[str, Any]:
        """Returns the keys of groups, where the base optimizer is not fastreg's and adds none."""
        if self._sync is None:
            return {}
        steps = self.param_groups[0].get("lookahead_step", 0) if self.param_groups else 0
        return {**self._sync.component.options(), "lookahead_step": steps}

    @torch.no_grad()
    def _start(self) -> None:
        """Starts slow weights as the parameters are, where there are none."""
        holder: Any = self._sync or self.fused_optimizer
        buffer = next(c.slow_buffer for c in holder.components if isinstance(c, SlowWeights))
        for p in self._parameters:
            if buffer.name not in holder.state[p]:
                chain = holder.chain(self.param_groups[0], layout.local(p).dtype)
                dtype = holder.buffer_dtype(chain, buffer, p)
                holder.state[p][buffer.name] = p.detach().to(dtype, copy=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, whose slow weights start as its parameters are."""
        super().add_param_group(param_group)
        self._start()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return self._sync is None and bool(getattr(self.base_optimizer, "_step_supports_amp_scaling", False))

    @torch._disable_dynamo
    def step(
        self, closure: Callable[[], Any] | None = None, *, grad_scaler: Any = None,
        gradients: Gradients | None = None,
    ) -> Any:  # fmt: skip
        """Takes one step of the base optimizer, and every k-th of the slow weights.

        Arguments and result are those of the base optimizer, see `FusedOptimizer.step`.

        Raises:
            RuntimeError: While the slow weights are swapped in.
        """
        base: Any = self.base_optimizer
        arguments: dict[str, Any] = {} if gradients is None else {"gradients": gradients}
        if self._sync is None:
            if grad_scaler is not None or hasattr(self, "grad_scale"):
                arguments["grad_scaler"] = amp.scaling(self, grad_scaler)
            return base.step(closure, **arguments)
        if self._sync.active_average is not None:
            raise RuntimeError("step() would train the slow weights: call optimizer.train() first")
        loss = base.step(closure, **arguments)
        self._sync.after_step()
        return loss

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the base optimizer; of averages, that of the pass, where there is one."""
        if name in ("averaged", "eval", "train") and self._sync is not None:
            return getattr(self._sync, name)
        return super().__getattr__(name)

    @property
    def state_holder(self) -> _Sync | None:
        """The pass with the slow weights; `None` around a fastreg optimizer."""
        return self._sync

    def _saved_names(self) -> dict[str, str]:
        names = ("slow", "slow_momentum", TRAINED)
        return {**{name: name for name in names}, "step": "lookahead_count"} if self._sync else {}


class _Always(SlowWeights):
    """The slow weights of a pass that only runs when they are due."""

    def due(self, group: dict[str, Any], step: int) -> bool:
        return True


class _Sync(AveragingOptimizer):
    """The pass that reads and writes parameters and their slow weights, and nothing else."""

    _KEPT = (*AveragingOptimizer._KEPT, "component", "_base")

    def __init__(self, base: torch.optim.Optimizer, component: SlowWeights) -> None:
        self.component = _Always(component.k, component.alpha, component.pullback_momentum)
        self._base = base
        self._set_components((self.component,), seed=0)
        self.__setstate__({"defaults": {}, "state": defaultdict(dict), "param_groups": base.param_groups})

    def after_step(self) -> None:
        self.param_groups = self._base.param_groups
        for group in self.param_groups:
            group["lookahead_step"] += 1
        operands = self._operands()
        due = [group["lookahead_step"] % group["lookahead_k"] == 0 for group in self.param_groups]
        operands = operands._replace(gradients=operands.parameters).only(due[i] for i in operands.groups)
        if operands.parameters:
            self._run_step(operands)
            self._pull_back_moments(operands)

    @torch.no_grad()
    def _pull_back_moments(self, operands: Operands) -> None:
        if self.component.pullback_momentum == "none":
            return
        for p, group in zip(operands.parameters, operands.groups, strict=True):
            slow = self.state[p].get("slow_momentum")
            for name in FIRST_MOMENTS:
                moment = self._base.state.get(p, {}).get(name)
                if moment is not None:
                    alpha = self.param_groups[group]["lookahead_alpha"]
                    self.component.pull_back(moment, slow, alpha, 1.0)
