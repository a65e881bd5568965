"""Noise on the outputs of modules of a model as it is: hooks, and the handle that removes them."""

from __future__ import annotations

import fnmatch
import re
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .noise import ActivationNoise

SHOWN = 20
"""Names that an error lists at most."""

Pattern = str | re.Pattern[str] | type[nn.Module] | tuple[type[nn.Module], ...]


class Attached:
    """Hooks that stay until `remove()`, or to the end of a `with` block.

    torch looks at hooks when it compiles, and by default not again.  `remove()` therefore sets the level to 0
    as well, with which code that was compiled before does nothing.  It stays 0 then, whatever sets it.
    """

    def __init__(self) -> None:
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def remove(self) -> None:
        """Take the noise away; once more does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._silence()

    def _silence(self) -> None:
        """Set the level to 0."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


class Noisy:
    """A forward hook: noise on the output of a module while that trains.

    Args:
        std: See `ActivationNoise`.
        kind: Likewise.
        device: Where the module is.
    """

    def __init__(self, std: float, kind: str, device: torch.device) -> None:
        # No child of the module: `Sequential` would call it.
        self.noise = ActivationNoise(std, kind).to(device)

    def hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The output with noise."""
        if not module.training:
            return output
        x, others = first_tensor(output, module)
        if not torch.compiler.is_compiling() and self.noise.level.device != x.device:
            self.noise.to(x.device)
        return others(self.noise(x))


def first_tensor(output: Any, module: nn.Module) -> tuple[Tensor, Any]:
    """The tensor of an output, the first of several, and what puts another into its place.

    Raises:
        TypeError: If there is none.
    """
    if isinstance(output, Tensor):
        return output, lambda x: x
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        made = getattr(type(output), "_make", type(output))
        return output[0], lambda x: made([x, *output[1:]])
    raise TypeError(
        f"noise needs a module whose output is a tensor or starts with one, {type(module).__name__} has "
        f"returned {type(output).__name__}; attach it to a module within"
    )


class AttachedNoise(Attached):
    """What `attach_activation_noise` returns.

    Attributes:
        names: Of the modules whose outputs get noise.
    """

    def __init__(self, modules: dict[str, nn.Module], std: float, kind: str, device: torch.device) -> None:
        super().__init__()
        self.names, self.kind = tuple(modules), kind
        self._noisy = [
            Noisy(std, kind, next((p.device for p in module.parameters()), device))
            for module in modules.values()
        ]
        self._hooks = [
            module.register_forward_hook(noisy.hook)
            for module, noisy in zip(modules.values(), self._noisy, strict=True)
        ]

    @property
    def std(self) -> float:
        """The standard deviation of all; may be set at any time, and compiles nothing anew."""
        return self._noisy[0].noise.std

    @std.setter
    def std(self, value: float) -> None:
        if self._hooks:
            self._set(value)

    def _silence(self) -> None:
        self._set(0.0)

    def _set(self, value: float) -> None:
        for noisy in self._noisy:
            noisy.noise.std = value

    def __repr__(self) -> str:
        return f"{type(self).__name__}(std={self.std}, kind={self.kind!r}, names={self.names})"


def attach_activation_noise(
    model: nn.Module, pattern: Pattern, std: float, kind: str = "additive"
) -> AttachedNoise:
    """Puts Gaussian noise on the outputs of some modules of a model, by hooks, while these train.

    ```python
    noise = attach_activation_noise(model, "*.mlp", std=0.01)
    noise = attach_activation_noise(model, torch.nn.LayerNorm, 0.05, kind="multiplicative")
    ...
    noise.remove()  # or: with attach_activation_noise(...):
    ```

    Where a module returns a tuple or a list, its first tensor gets the noise.  Attach before the first call
    of a compiled model: torch does not see later hooks.

    Args:
        model: The model.
        pattern: What the dotted name must match: a string with `*`, `?` and `[...]` (`*` matches dots, too),
            or a compiled regular expression, which must match all of it; or one or several module classes.
        std: See `ActivationNoise`.
        kind: Likewise.

    Returns:
        What removes them again; its `std` may be set between steps.

    Raises:
        TypeError: For a pattern of another type.
        ValueError: If nothing matches, std is out of range, or there is no such kind.
    """
    named = {name: module for name, module in model.named_modules() if name}
    found = {name: module for name, module in named.items() if _matches(pattern, name, module)}
    if not found:
        if isinstance(pattern, (str, re.Pattern)):
            candidates = list(named)
        else:
            candidates = sorted({type(module).__name__ for module in named.values()})
        shown = ", ".join(candidates[:SHOWN] or ["none"]) + (
            f" and {len(candidates) - SHOWN} more" if len(candidates) > SHOWN else ""
        )
        raise ValueError(f"{pattern!r} matches no module of {type(model).__name__}; there are: {shown}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return AttachedNoise(found, std, kind, device)


def _matches(pattern: Pattern, name: str, module: nn.Module) -> bool:
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(name, pattern)
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(name) is not None
    if isinstance(pattern, (type, tuple)):
        return isinstance(module, pattern)
    raise TypeError(f"pattern must be a string, a regular expression or a class of modules, got {pattern!r}")
