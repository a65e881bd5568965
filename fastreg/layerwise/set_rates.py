"""Sets dropout rates by layer and role, and asserts them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..common.unwrap import unwrap_model
from ..schedules import LayerRates, layer_rate
from .audit import Audit, audit
from .sites import ROLES, DropoutSite
from .table import DropoutTable
from .write_rates import injection_sites, write

Rates = LayerRates | Mapping[str, LayerRates]
"""A rate, one rate for each layer, or a function of (layer, number of layers); or a dict of these by role."""

RATE_AWARE = "eager, sdpa and flash_attention_2"
"""Attention functions that use the dropout rate they are passed."""


def set_dropout(
    model: nn.Module, schedule: Rates, roles: str | Sequence[str] = ("hidden",), inject: bool = False, *,
    stacks: str | Sequence[str] | None = None, inputs: Any = None,
) -> DropoutTable:  # fmt: skip
    """Sets the dropout rates of any transformer, layer by layer, and returns what took effect.

    ```python
    table = set_dropout(model, LinearLayers(0.1, increase=0.02))
    set_dropout(model, {"hidden": [0.1, 0.2, 0.3], "attention": 0.1, "path": DropPathLayers(0.2)})
    set_dropout(llama, 0.1, inject=True)
    print(table)
    ```

    One forward pass finds the role of each dropout site (see `audit`).  `nn.Dropout` and `DropPath` become
    modules of `fastreg.nn`, whose rates may change under `torch.compile` without recompilation.  Rates that a
    model passes to functions stay Python floats: attention probabilities in nearly all models, all rates of
    BART, OPT and Whisper.  They take effect, but `torch.compile` recompiles for each value; the table shows
    `float`.

    Errors leave the model unchanged.  Keys of the `state_dict` do not change; rates are saved in the
    configuration, see `restore`; `remove` undoes all changes.

    Args:
        model: Any model.
        schedule: A rate in [0, 1]; a list with one for each layer; a function of (layer, number of layers),
            or of the layer, such as `LinearLayers` and `DropPathLayers`; or a dict of these by role.  Layers
            count from 0 in each stack of blocks: an encoder and a decoder have one each.  Sites before the
            blocks get the rate of the first layer, sites after them that of the last.
        roles: The roles to set: `"hidden"` (outputs of attention and MLP), `"attention"` (probabilities),
            `"activation"` (inside MLPs), `"embedding"`, `"head"`, `"path"` (residual branches),
            `"layerdrop"`, `"adapter"` (inputs of LoRA).  Ignored for a dict, whose keys are the roles.
        inject: Whether to add hidden dropout behind attention and MLP of blocks that have none, as in LLaMA,
            Qwen2, Mistral and Gemma.
        stacks: Prefixes of the stacks to set, such as `"model.encoder"`; by default all.
        inputs: For the forward pass, see `audit`.

    Returns:
        The rates that were set, with path, role, layer and how.

    Raises:
        ValueError: For rates out of range, and if the model has no dropout of a role.
    """
    model, wanted = unwrap_model(model), by_role(schedule, roles)
    targets = choose(model, audit(model, inputs), tuple(wanted), inject, stacks)
    return write(model, targets, {site.path: rate_of(wanted[site.role], site) for site in targets})


def assert_dropout(
    model: nn.Module, expected: Rates | DropoutTable, roles: str | Sequence[str] = ("hidden",), *,
    stacks: str | Sequence[str] | None = None, inputs: Any = None,
) -> None:  # fmt: skip
    """Asserts that a forward pass of a model drops at these rates.

    ```python
    assert_dropout(model, LinearLayers(0.1, increase=0.02))
    assert_dropout(model, table)  # of set_dropout
    ```

    Expected are rates as in the schedule of `set_dropout`, or the table that it returned.  Other
    arguments are those of `set_dropout`.

    Raises:
        AssertionError: With all differences.
        ValueError: For rates out of range.
    """
    model = unwrap_model(model)
    audited = audit(model, inputs)
    if isinstance(expected, DropoutTable):
        rates = expected.rates
        targets = [site for site in audited.sites if site.path in rates]
        differs = [f"{path}: not there" for path in rates.keys() - {site.path for site in targets}]
    else:
        wanted = by_role(expected, roles)
        try:
            targets = choose(model, audited, tuple(wanted), False, stacks)
        except MissingRoleError as error:
            raise AssertionError(str(error)) from None
        rates = {site.path: rate_of(wanted[site.role], site) for site in targets}
        differs = []
    differs += [
        f"{site.path}: {site.rate!r}, expected {rates[site.path]!r}"
        for site in targets
        if site.rate != rates[site.path]
    ]
    if differs:
        lines = "".join(f"\n  {line}" for line in differs)
        raise AssertionError(f"{len(differs)} of {len(rates)} dropout rates differ:{lines}")


class MissingRoleError(ValueError):
    """The error for a model without dropout of a role."""


def by_role(schedule: Any, roles: str | Sequence[str]) -> dict[str, Any]:
    """Returns the schedule of each role."""
    roles = (roles,) if isinstance(roles, str) else tuple(roles)
    wanted = dict(schedule) if isinstance(schedule, Mapping) else dict.fromkeys(roles, schedule)
    unknown = [role for role in wanted if role not in ROLES]
    if unknown or not wanted:
        raise ValueError(f"roles must be among {', '.join(map(repr, ROLES))}, got {tuple(wanted)}")
    return wanted


def rate_of(rates: LayerRates, site: DropoutSite) -> float:
    """Returns the rate of a site by its layer."""
    if site.role == "layerdrop" and (callable(rates) or isinstance(rates, Sequence)):
        raise ValueError(f"layerdrop is one rate for all layers: give {site.path} a number, got {rates!r}")
    if not site.layers and (callable(rates) or isinstance(rates, Sequence)):
        raise ValueError(f"found no repeated layers around {site.path}: give a number, got {rates!r}")
    return layer_rate(rates, site.position, site.layers)


def choose(
    model: nn.Module, audited: Audit, roles: tuple[str, ...], inject: bool, stacks: str | Sequence[str] | None
) -> list[DropoutSite]:
    """Returns the sites of these roles, and with `inject` those where dropout is added.

    Raises:
        MissingRoleError: If there are none for a role.
    """
    only = (stacks,) if isinstance(stacks, str) else stacks

    def inside(site: DropoutSite) -> bool:
        return only is None or site.stack.startswith(tuple(only))

    targets = [s for s in audited.sites if s.role in roles and inside(s) and (only is None or s.stack)]
    used = {(site.role, site.stack) for site in targets if site.uses != 0}
    for role in roles:
        candidates = injection_sites(model) if role == "hidden" else ()
        without = [site for site in candidates if inside(site) and ("hidden", site.stack) not in used]
        if without and inject:
            targets += without
        elif without or role not in {name for name, _ in used}:
            raise MissingRoleError(
                _missing(model, audited, role, inject, sorted({site.stack for site in without}))
            )
    return targets


def _missing(model: nn.Module, audited: Audit, role: str, inject: bool, without: Iterable[str]) -> str:
    here = ", ".join(dict.fromkeys(repr(site.role) for site in audited.sites if site.uses != 0)) or "none"
    message = f"{type(model).__name__} has no {role!r} dropout"
    if without:
        message += f" in {', '.join(without)}: give inject=True to add it behind attention and MLP"
    elif role == "hidden" and inject:
        message += ", and no attention or MLP in repeated layers to add it behind"
    elif unused := [site.path for site in audited.sites if site.role == role]:
        message += f" that is used: {', '.join(unused)} had no effect in a forward pass"
        if role == "attention":
            message += f"; rates are used by {RATE_AWARE}"
    return f"{message} (roles it has: {here})"
