"""Attaches noise to the outputs of modules of an existing model, by hooks that can be removed."""

import fnmatch
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.batches import map_first_tensor
from ..common.unwrap import unwrap_model
from .noise import ActivationNoise

MOST_NAMES = 20
"""Names that an error lists at most."""

Pattern = str | re.Pattern[str] | type[nn.Module] | tuple[type[nn.Module], ...]


class Attached:
    """Base of hooks that add noise until `remove()`, or to the end of a `with` block.

    torch reads hooks when it compiles, and by default not again.  `remove()` therefore also sets the level
    to 0, for good, with which code that was compiled before adds no noise.

    Args:
        noises: The modules that add the noise; all have the same level.
    """

    def __init__(self, noises: Sequence[Any]) -> None:
        self._noises = noises
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def remove(self) -> None:
        """Removes the hooks; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for noise in self._noises:
            noise.silence()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


def attached_level(name: str) -> Any:
    """Returns a property of an `Attached`: a level of its noise, to read and, until it is removed, to set."""

    def read(attached: Attached) -> float | None:
        return getattr(attached._noises[0], name)

    def write(attached: Attached, value: float) -> None:
        for noise in attached._noises if attached._hooks else ():
            setattr(noise, name, value)

    return property(read, write, doc=f"The {name} of the noise; may be set at any time.")


class _HookNoise(ActivationNoise):
    """Noise with a forward hook; no child of the module it is for, which a `Sequential` would call."""

    def hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        return map_first_tensor(module, output, self._add) if module.training else output

    def _add(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and self.level.device != x.device:
            self.to(x.device)
        return self(x)


class AttachedNoise(Attached):
    """The noise that `attach_activation_noise` has attached, to set and remove.

    Attributes:
        names: Names of the modules whose outputs get noise.
    """

    std = attached_level("std")

    def __init__(self, modules: dict[str, nn.Module], std: float, kind: str, device: torch.device) -> None:
        devices = (next((p.device for p in module.parameters()), device) for module in modules.values())
        noises = [_HookNoise(std, kind).to(device) for device in devices]
        super().__init__(noises)
        self.names, self.kind = tuple(modules), kind
        self._hooks = [m.register_forward_hook(n.hook) for m, n in zip(modules.values(), noises, strict=True)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(std={self.std}, kind={self.kind!r}, names={self.names})"


def attach_activation_noise(
    model: nn.Module, pattern: Pattern, std: float, kind: str = "additive"
) -> AttachedNoise:
    """Adds Gaussian noise to the outputs of some modules of a model, by hooks, while these train.

    ```python
    noise = attach_activation_noise(model, "*.mlp", std=0.01)
    noise = attach_activation_noise(model, torch.nn.LayerNorm, 0.05, kind="multiplicative")
    ...
    noise.remove()  # or: with attach_activation_noise(...):
    ```

    If a module returns a tuple or a list, its first tensor gets the noise.  Attach before the first call of
    a compiled model: torch does not see later hooks.

    Args:
        model: The model, wrapped (see `unwrap_model`) or not: names are those of the model inside.
        pattern: A pattern for dotted names, a string with `*`, `?` and `[...]` (`*` matches dots, too) or a
            compiled regular expression, which must match all of a name; or one or several module classes.
        std: See `ActivationNoise`.
        kind: See `ActivationNoise`.

    Returns:
        The attached noise; its `std` may be set between steps, and `remove()` takes it away.

    Raises:
        TypeError: For a pattern of another type.
        ValueError: If nothing matches, std is out of range, or there is no such kind.
    """
    inside = unwrap_model(model, peft=True)
    matching = _matching(inside, pattern) or _matching(model, pattern)
    if not matching:
        named = {name: module for name, module in inside.named_modules() if name}
        if isinstance(pattern, (str, re.Pattern)):
            candidates = list(named)
        else:
            candidates = sorted({type(module).__name__ for module in named.values()})
        listed = ", ".join(candidates[:MOST_NAMES] or ["none"]) + (
            f" and {len(candidates) - MOST_NAMES} more" if len(candidates) > MOST_NAMES else ""
        )
        raise ValueError(f"{pattern!r} matches no module of {type(inside).__name__}; there are: {listed}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return AttachedNoise(matching, std, kind, device)


def _matching(model: nn.Module, pattern: Pattern) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if name and _matches(pattern, name, m)}


def _matches(pattern: Pattern, name: str, module: nn.Module) -> bool:
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(name, pattern)
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(name) is not None
    if isinstance(pattern, (type, tuple)):
        return isinstance(module, pattern)
    raise TypeError(f"pattern must be a string, a regular expression or a class of modules, got {pattern!r}")
