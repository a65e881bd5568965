"""Setting rates by layer and role, and asserting them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..schedules import LayerRates, layer_rate
from .apply import empty_places, write
from .audit import Audit, audit
from .knobs import ROLES, Knob, unwrapped
from .table import Table

Rates = LayerRates | Mapping[str, LayerRates]
"""A rate, one for each layer, a function of (layer, number of layers); or these by role."""

HEEDING = "eager, sdpa and flash_attention_2"
"""Functions of attention that drop at the rate they are given."""


def set_dropout(
    model: nn.Module, schedule: Rates, roles: str | Sequence[str] = ("hidden",), inject: bool = False, *,
    stacks: str | Sequence[str] | None = None, inputs: Any = None,
) -> Table:  # fmt: skip
    """Sets the dropout rates of any transformer, layer by layer, and says what took effect.

    ```python
    table = set_dropout(model, LinearLayers(0.1, increase=0.02))
    set_dropout(model, {"hidden": [0.1, 0.2, 0.3], "attention": 0.1, "path": DropPathLayers(0.2)})
    set_dropout(llama, 0.1, inject=True)
    print(table)
    ```

    One forward pass finds what every dropout of the model does (see `audit`).  `nn.Dropout` and `DropPath`
    become modules of `fastreg.nn`, whose rates may change under `torch.compile` at no cost.  Rates that a
    model hands to functions stay Python floats: those of attention probabilities in nearly all, all of
    BART's, OPT's and Whisper's.  They work, but `torch.compile` compiles anew for each value; the table says
    `float`.

    Nothing is changed where an error is raised.  Keys of the `state_dict` stay as they are; rates are kept in
    the configuration, see `restore`; `remove` undoes all.

    Args:
        model: Any model.
        schedule: A rate in [0, 1]; a list with one for each layer; a function of (layer, number of layers),
            or of the layer, such as `LinearLayers` and `DropPathLayers`; or a dict of these by role.  Layers
            count from 0 in each stack of blocks: an encoder and a decoder have one each.  What stands before
            the blocks gets the rate of the first layer, what stands after them that of the last.
        roles: What to set: `"hidden"` (outputs of attention and MLP), `"attention"` (probabilities),
            `"activation"` (inside MLPs), `"embedding"`, `"head"`, `"path"` (residual branches),
            `"layerdrop"`, `"adapter"` (inputs of LoRA).  The keys of a dict say so themselves.
        inject: Whether to add hidden dropout behind attention and MLP of blocks that have none, as in LLaMA,
            Qwen2, Mistral and Gemma.
        stacks: Only stacks whose name starts so, such as `"model.encoder"`.
        inputs: For the forward pass, see `audit`.

    Returns:
        The rates that were set, with path, role, layer and how.

    Raises:
        ValueError: For rates out of range, and where a role is missing: nothing is silently without effect.
    """
    return _set(unwrapped(model), by_role(schedule, roles), inject, stacks, inputs)


def _set(model: nn.Module, wanted: Mapping[str, LayerRates], inject: bool, stacks: Any, inputs: Any) -> Table:
    targets = choose(model, audit(model, inputs), tuple(wanted), inject, stacks)
    return write(model, targets, {knob.path: rate_of(wanted[knob.role], knob) for knob in targets})


def assert_dropout(
    model: nn.Module, expected: Rates | Table, roles: str | Sequence[str] = ("hidden",), *,
    stacks: str | Sequence[str] | None = None, inputs: Any = None,
) -> None:  # fmt: skip
    """Asserts that a model drops at these rates, by what a forward pass does.

    ```python
    assert_dropout(model, LinearLayers(0.1, increase=0.02))
    assert_dropout(model, table)  # of set_dropout
    ```

    Args:
        model: Any model.
        expected: As for `set_dropout`, or the table it returned.
        roles: As for `set_dropout`.
        stacks: As for `set_dropout`.
        inputs: For the forward pass, see `audit`.

    Raises:
        AssertionError: With all that differs.
        ValueError: For rates out of range.
    """
    model = unwrapped(model)
    found = audit(model, inputs)
    if isinstance(expected, Table):
        rates = expected.rates
        targets = [knob for knob in found.knobs if knob.path in rates]
        differs = [f"{path}: not there" for path in rates.keys() - {knob.path for knob in targets}]
    else:
        wanted = by_role(expected, roles)
        try:
            targets = choose(model, found, tuple(wanted), False, stacks)
        except MissingRoleError as error:
            raise AssertionError(str(error)) from None
        rates = {knob.path: rate_of(wanted[knob.role], knob) for knob in targets}
        differs = []
    differs += [
        f"{knob.path}: {knob.rate!r}, expected {rates[knob.path]!r}"
        for knob in targets
        if knob.rate != rates[knob.path]
    ]
    if differs:
        lines = "".join(f"\n  {line}" for line in differs)
        raise AssertionError(f"{len(differs)} of {len(rates)} dropout rates differ:{lines}")


class MissingRoleError(ValueError):
    """A model has no dropout of a role."""


def by_role(schedule: Any, roles: str | Sequence[str]) -> dict[str, Any]:
    """What is wanted for each role."""
    roles = (roles,) if isinstance(roles, str) else tuple(roles)
    wanted = dict(schedule) if isinstance(schedule, Mapping) else dict.fromkeys(roles, schedule)
    unknown = [role for role in wanted if role not in ROLES]
    if unknown or not wanted:
        raise ValueError(f"roles must be among {', '.join(map(repr, ROLES))}, got {tuple(wanted)}")
    return wanted


def rate_of(rates: LayerRates, knob: Knob) -> float:
    """The rate of a knob by its layer."""
    if knob.role == "layerdrop" and (callable(rates) or isinstance(rates, Sequence)):
        raise ValueError(f"layerdrop is one rate for all layers: give {knob.path} a number, got {rates!r}")
    if not knob.layers and (callable(rates) or isinstance(rates, Sequence)):
        raise ValueError(f"found no repeated layers around {knob.path}: give a number, got {rates!r}")
    return layer_rate(rates, knob.position, knob.layers)


def choose(
    model: nn.Module, found: Audit, roles: tuple[str, ...], inject: bool, stacks: str | Sequence[str] | None
) -> list[Knob]:
    """The knobs of these roles, and places to inject.

    Raises:
        MissingRoleError: If there are none for a role.
    """
    only = (stacks,) if isinstance(stacks, str) else stacks
    inside = [
        knob for knob in found.knobs if only is None or knob.stack.startswith(tuple(only)) and knob.stack
    ]
    targets = [knob for knob in inside if knob.role in roles]
    used = {(knob.role, knob.stack) for knob in targets if knob.uses != 0}
    for role in roles:
        without = _injectable(model, only, used) if role == "hidden" else []
        if without and inject:
            targets += without
        elif without or role not in {name for name, _ in used}:
            raise MissingRoleError(
                _missing(model, found, role, inject, sorted({knob.stack for knob in without}))
            )
    return targets


def _injectable(model: nn.Module, only: Any, used: set[tuple[str, str]]) -> list[Knob]:
    """Places in stacks without hidden dropout."""
    return [
        knob
        for knob in empty_places(model)
        if ("hidden", knob.stack) not in used and (only is None or knob.stack.startswith(tuple(only)))
    ]


def _missing(model: nn.Module, found: Audit, role: str, inject: bool, without: Iterable[str]) -> str:
    here = ", ".join(dict.fromkeys(repr(knob.role) for knob in found.knobs if knob.uses != 0)) or "none"
    message = f"{type(model).__name__} has no {role!r} dropout"
    if without:
        message += f" in {', '.join(without)}: give inject=True to add it behind attention and MLP"
    elif role == "hidden" and inject:
        message += ", and no attention or MLP in repeated layers to add it behind"
    elif unused := [knob.path for knob in found.knobs if knob.role == role]:
        message += f" that is used: {', '.join(unused)} had no effect in a forward pass"
        if role == "attention":
            message += f"; rates are heeded by {HEEDING}"
    return f"{message} (roles it has: {here})"
