"""Base of optimizers around another one, with whose groups and state they work.

Schedulers and checkpoints see a single optimizer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..engine.multi_tensor_optimizer import MultiTensorOptimizer
from .fused_optimizer import FusedOptimizer


class Wrapper(torch.optim.Optimizer):
    """Base of the optimizers that wrap another one, their `base_optimizer`."""

    base_optimizer: torch.optim.Optimizer

    def __init__(self, base_optimizer: torch.optim.Optimizer) -> None:
        # The constructor of torch's class would make groups and state of its own.
        torch.optim.Optimizer.__setstate__(self, {"base_optimizer": base_optimizer})

    @property
    def fused_optimizer(self) -> FusedOptimizer | None:
        """The fastreg optimizer inside all wrappers, `None` if it is another one."""
        inner: Any = self.base_optimizer
        while isinstance(inner, Wrapper):
            inner = inner.base_optimizer
        return inner if isinstance(inner, FusedOptimizer) else None

    engine = fused_optimizer  # the old name, for one release

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the base optimizer."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the base optimizer."""
        return self.base_optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of the base optimizer."""
        return self.base_optimizer.defaults

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the base optimizer, such as `grad_norm`, `averaged()` or `eval()`."""
        if name.startswith("_") or name == "base_optimizer":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base_optimizer, name)

    def options(self) -> dict[str, Any]:
        """Returns keys that a group gets unless it has them, and that are saved with it."""
        return {}

    def _complete(self) -> None:
        for group in self.param_groups:
            for key, value in self.options().items():
                group.setdefault(key, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group to the base optimizer."""
        self.base_optimizer.add_param_group(param_group)
        self._complete()

    # Checkpoints: one dictionary in torch's form. The wrapper's state of a parameter is saved beside the base
    # optimizer's state of it.

    @property
    def state_holder(self) -> MultiTensorOptimizer | None:
        """The pass with the wrapper's state of parameters; `None` if it has none."""
        return None

    def _saved_names(self) -> dict[str, str]:
        """Returns the keys of that state that are saved, each with its name in checkpoints."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns groups and state of the base optimizer and the wrapper, in torch's form."""
        saved, holder = self.base_optimizer.state_dict(), self.state_holder
        if holder is None:
            return saved
        state = dict(saved["state"])
        for index, p in enumerate(self._parameters):
            values = holder.state.get(p, {})
            added = {name: values[key] for key, name in self._saved_names().items() if key in values}
            if added:
                state[index] = {**state.get(index, {}), **added}
        return {**saved, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint; the wrapper's state is copied in the precision in which it was saved."""
        keys = {name: key for key, name in self._loadable_names().items()}
        base_state, added = {}, {}
        for index, value in state_dict["state"].items():
            values = value if isinstance(value, dict) else {}
            added[index] = {keys[name]: values[name] for name in values if name in keys}
            others = {name: values[name] for name in values if name not in keys} if values else value
            if others or not added[index]:
                base_state[index] = others
        options = [{key: group[key] for key in self.options()} for group in self.param_groups]
        self.base_optimizer.load_state_dict({**state_dict, "state": base_state})
        for group, kept in zip(self.param_groups, options, strict=True):  # where the checkpoint has none
            group.update({**kept, **group})
        holder = self.state_holder
        if holder is None:
            return
        holder.param_groups = self.param_groups
        holder.state.clear()
        holder.reset_cache()
        indices = (index for group in state_dict["param_groups"] for index in group["params"])
        for index, p in zip(indices, self._parameters, strict=True):
            if added.get(index):
                holder.state[p] = {
                    key: value.to("cpu" if key == "step" else p.device, copy=True)
                    for key, value in added[index].items()
                }

    def _loadable_names(self) -> dict[str, str]:
        """Returns all that `_saved_names` may ever return."""
        return self._saved_names()

    def __getstate__(self) -> dict[str, Any]:
        """Returns what copies and pickles keep: all but the patched step."""
        dropped = ("step", "_zero_grad_profile_name")
        return {name: value for name, value in vars(self).items() if name not in dropped}


def evaluated(closure: Callable[[], Any]) -> Any:
    """Returns what a closure returns, called with gradients enabled."""
    with torch.enable_grad():
        return closure()
