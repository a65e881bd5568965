"""Writing rates into a model, and keeping them: in its configuration, beside what was there before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import nn

from .. import nn as ours
from ..nn.replace import FUSED, replace
from .inject import attach, branches, detach
from .knobs import INJECTED, Knob, knobs, places, unwrapped
from .table import Row, Table

FIELD = "fastreg"
"""Of the configuration: `{"dropout": {path: rate}}`, which `save_pretrained` writes with all others."""

ORIGINAL = "_fastreg_original"
"""Of the model: what stood at each path before, a number or a module."""


def write(model: nn.Module, found: Iterable[Knob], rates: Mapping[str, float]) -> Table:
    """Write a rate into each knob, and note it in the configuration.

    Modules are replaced by fastreg's, so that later rates compile nothing anew; not where a model only reads
    their `p`.

    Args:
        model: The model itself, see `unwrapped`.
        found: Knobs, or places for some, of kind `"injected"`.
        rates: Rates by path.
    """
    original = vars(model).setdefault(ORIGINAL, {})
    rows = []
    for knob in found:
        rate = rates[knob.path]
        if knob.kind == "injected":
            knob.owner, knob.kind, knob.called = attach(knob.owner, rate), "module", True
        elif (new := _replacement(knob, rate)) is not None:
            original.setdefault(knob.path, knob.owner)
            replace(model, knob.owner, new)
            knob.owner, knob.attribute = new, "drop_prob" if isinstance(new, ours.DropPath) else "p"
            knob.kind, knob.called = "module", True
        else:
            if not knob.path.endswith(INJECTED):
                original.setdefault(knob.path, getattr(knob.owner, knob.attribute))
            setattr(knob.owner, knob.attribute, rate)
        rows.append(Row(knob.path, knob.role, knob.layer, rate, _how(knob), knob.stack))
    _remember(model, {row.path: row.rate for row in rows})
    return Table(rows)


def restore(model: nn.Module, strict: bool = True) -> Table:
    """Sets the dropout rates that the configuration keeps, as after `from_pretrained`.

    `save_pretrained` writes them into `config.json`, but a model is built without them.  Calling it twice
    does no more than once.

    ```python
    fastreg.layerwise.set_dropout(model, LinearLayers(0.1, 0.02))
    model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    fastreg.layerwise.restore(model)
    ```

    Args:
        model: A model with a `config`, of the class that was saved or with another head.
        strict: Whether every rate must have its place.

    Returns:
        What was set; empty where nothing was kept.

    Raises:
        ValueError: If the model has no place for a rate.
    """
    model = unwrapped(model)
    kept = dict(getattr(getattr(model, "config", None), FIELD, None) or {}).get("dropout", {})
    here = {knob.path: knob for knob in [*empty_places(model), *knobs(model)]}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    rates, missing = {}, []
    for path, rate in kept.items():
        names = [name for name in (path, path.removeprefix(prefix), prefix + path) if name in here]
        if names:
            rates[names[0]] = rate
        else:
            missing.append(path)
    if missing and strict:
        raise ValueError(
            f"{type(model).__name__} has no place for the rates of {', '.join(missing)}, which its "
            "configuration keeps: load the class that was saved, or give strict=False"
        )
    return write(model, [knob for path, knob in here.items() if path in rates], rates) if rates else Table(())


def remove(model: nn.Module) -> None:
    """Undoes all that `set_dropout`, `restore` and `DropoutScheduler` did.

    Rates, modules, hooks and the configuration are as they were before.

    Args:
        model: Any model.
    """
    model = unwrapped(model)
    here = {knob.path: knob for knob in knobs(model)}
    for path, before in vars(model).pop(ORIGINAL, {}).items():
        knob = here[path]
        if isinstance(before, nn.Module):
            replace(model, knob.owner, before)
        else:
            setattr(knob.owner, knob.attribute, before)
    for module in list(model.modules()):
        detach(module)
    vars(getattr(model, "config", model)).pop(FIELD, None)


def remembered(model: nn.Module) -> Callable[[], None]:
    """What undoes all that is set from now on, and nothing that was set before."""
    model = unwrapped(model)
    changed, config = vars(model).get(ORIGINAL, {}), getattr(model, "config", None)
    note = copy.deepcopy(getattr(config, FIELD, None))  # a checkpoint's, even without `restore`
    before = {
        knob.path: knob.rate for knob in knobs(model) if knob.path in changed or knob.path.endswith(INJECTED)
    }

    def undo() -> None:
        remove(model)
        if before:
            here = {knob.path: knob for knob in [*empty_places(model), *knobs(model)]}
            write(model, [here[path] for path in before], before)
        if note is not None:
            setattr(config, FIELD, note)

    return undo


def _replacement(knob: Knob, rate: float) -> nn.Module | None:
    """A module of fastreg to take the place of the knob's, where it should."""
    module = knob.owner
    if knob.kind == "identity":
        return ours.DropPath(rate) if knob.role == "path" else ours.Dropout(rate)
    if knob.kind == "path" and not isinstance(module, ours.DropPath) and hasattr(module, "drop_prob"):
        return ours.DropPath(rate, bool(getattr(module, "scale_by_keep", True)))
    if knob.kind == "module" and type(module) in FUSED and not knob.is_number:
        return FUSED[type(module)](rate, inplace=module.inplace)
    return None


def _how(knob: Knob) -> str:
    if knob.path.endswith(INJECTED):
        return "injected"
    return knob.kind if knob.kind == "config" else "float" if knob.is_number else "module"


def _remember(model: nn.Module, rates: dict[str, float]) -> None:
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        kept = getattr(config, FIELD, None) or {}
        setattr(config, FIELD, {**kept, "dropout": {**kept.get("dropout", {}), **rates}})


def empty_places(model: nn.Module) -> Iterator[Knob]:
    """Where something could be injected."""
    for block, (stack, layer, layers) in places(model).items():
        for name in branches(model.get_submodule(block)):
            owner = model.get_submodule(f"{block}.{name}")
            yield Knob(f"{block}.{name}.{INJECTED}", "hidden", stack, layer, layers, "injected", owner, "p")
