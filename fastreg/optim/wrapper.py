"""Optimizers around another: its groups and state are theirs, so schedulers and checkpoints see one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..engine.multi_tensor_optimizer import MultiTensorOptimizer
from .fused_optimizer import FusedOptimizer


class Wrapper(torch.optim.Optimizer):
    """Base of wrappers.

    Attributes:
        base_optimizer: What is wrapped.
    """

    base_optimizer: torch.optim.Optimizer

    def __init__(self, base_optimizer: torch.optim.Optimizer) -> None:
        # The constructor of torch's class would make groups and state of its own.
        torch.optim.Optimizer.__setstate__(self, {"base_optimizer": base_optimizer})

    @property
    def engine(self) -> FusedOptimizer | None:
        """The fastreg optimizer inside, if that is what is wrapped."""
        inner: Any = self.base_optimizer
        while isinstance(inner, Wrapper):
            inner = inner.base_optimizer
        return inner if isinstance(inner, FusedOptimizer) else None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the base optimizer."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """That of the base optimizer."""
        return self.base_optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Those of the base optimizer."""
        return self.base_optimizer.defaults

    def __getattr__(self, name: str) -> Any:
        """What else the base optimizer offers, such as `grad_norm`, `averaged()`, `eval()` and `train()`."""
        if name.startswith("_") or name == "base_optimizer":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base_optimizer, name)

    def options(self) -> dict[str, Any]:
        """Keys that a group gets unless it has them, and that are saved with it."""
        return {}

    def _complete(self) -> None:
        for group in self.param_groups:
            for key, value in self.options().items():
                group.setdefault(key, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch."""
        self.base_optimizer.add_param_group(param_group)
        self._complete()

    # Checkpoints: one dictionary in torch's form. What the wrapper holds of a parameter stands beside the
    # base optimizer's state of it.

    def _own(self) -> MultiTensorOptimizer | None:
        """The pass whose state is the wrapper's own."""
        return None

    def _saved(self) -> dict[str, str]:
        """What is saved of that state, and under which name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """As in torch: groups and state of the base optimizer and the wrapper."""
        saved = self.base_optimizer.state_dict()
        own = self._own()
        if own is None:
            return saved
        parameters = (p for group in self.param_groups for p in group["params"])
        state = {
            key: dict(value) if isinstance(value, dict) else value for key, value in saved["state"].items()
        }
        for index, p in enumerate(parameters):
            held = {
                name: own.state[p][key]
                for key, name in self._saved().items()
                if p in own.state and key in own.state[p]
            }
            if held:
                state[index] = {**state.get(index, {}), **held}
        return {**saved, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; what the wrapper holds is copied in the precision in which it was saved.

        Raises:
            ValueError: As in torch.
        """
        names = {name: key for key, name in self._all_saved().items()}
        state, own_state = {}, {}
        for index, value in state_dict["state"].items():
            held = value if isinstance(value, dict) else {}
            own_state[index] = {names[name]: held[name] for name in held if name in names}
            rest = {name: held[name] for name in held if name not in names} if held else value
            if rest or not own_state[index]:
                state[index] = rest
        former = [{key: group[key] for key in self.options()} for group in self.param_groups]
        self.base_optimizer.load_state_dict({**state_dict, "state": state})
        for group, kept in zip(self.param_groups, former, strict=True):  # where the checkpoint knows none
            group.update({**kept, **group})
        own = self._own()
        if own is None:
            return
        own.param_groups = self.param_groups
        own.state.clear()
        own.reset_cache()
        indices = (index for group in state_dict["param_groups"] for index in group["params"])
        parameters = (p for group in self.param_groups for p in group["params"])
        for index, p in zip(indices, parameters, strict=True):
            if own_state.get(index):
                own.state[p] = {
                    key: value.to("cpu" if key == "step" else p.device, copy=True)
                    for key, value in own_state[index].items()
                }

    def _all_saved(self) -> dict[str, str]:
        """What `_saved` may ever return."""
        return self._saved()

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep: not the patched step."""
        return {
            name: value
            for name, value in vars(self).items()
            if name not in ("step", "_zero_grad_profile_name")
        }


def evaluated(closure: Callable[[], Any]) -> Any:
    """What a closure returns, with gradients."""
    with torch.enable_grad():
        return closure()


def no_gradients(groups: list[dict[str, Any]]) -> bool:
    """Whether no parameter has one."""
    return all(p.grad is None for group in groups for p in group["params"])
