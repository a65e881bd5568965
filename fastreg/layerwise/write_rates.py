"""Writes dropout rates into a model and its configuration, restores them, and removes them again."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import nn

from .. import nn as fastreg_nn
from ..common.unwrap import unwrap_model
from ..nn.replace import FUSED, replace
from .inject import attach, branches, detach
from .sites import INJECTED, DropoutSite, block_positions, dropout_sites
from .table import DropoutRow, DropoutTable

FIELD = "fastreg"
"""The field of the configuration, `{"dropout": {path: rate}}`, which `save_pretrained` writes, too."""

ORIGINAL = "_fastreg_original"
"""The attribute of the model with the original value at each path, a number or a module."""


def write(model: nn.Module, sites: Iterable[DropoutSite], rates: Mapping[str, float]) -> DropoutTable:
    """Writes a rate into each site, and records it in the configuration.

    Modules are replaced by fastreg's, so that new rates do not recompile; but not if the model only reads
    their `p`.

    Args:
        model: The model without wrappers.
        sites: Sites, including those of kind `"injected"`, where a module is added.
        rates: Rates by path.
    """
    original = vars(model).setdefault(ORIGINAL, {})
    rows = []
    for site in sites:
        rate = rates[site.path]
        if site.kind == "injected":
            site.owner, site.kind, site.called = attach(site.owner, rate), "module", True
        elif (new := _replacement(site, rate)) is not None:
            original.setdefault(site.path, site.owner)
            replace(model, site.owner, new)
            site.owner, site.attribute = new, "drop_prob" if isinstance(new, fastreg_nn.DropPath) else "p"
            site.kind, site.called = "module", True
        else:
            if not site.path.endswith(INJECTED):
                original.setdefault(site.path, getattr(site.owner, site.attribute))
            setattr(site.owner, site.attribute, rate)
        rows.append(DropoutRow(site.path, site.role, site.layer, rate, _how(site), site.stack))
    table, config = DropoutTable(rows), getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        saved = getattr(config, FIELD, None) or {}
        setattr(config, FIELD, {**saved, "dropout": {**saved.get("dropout", {}), **table.rates}})
    return table


def restore(model: nn.Module, strict: bool = True) -> DropoutTable:
    """Sets the dropout rates that are saved in the configuration, as after `from_pretrained`.

    `save_pretrained` writes them into `config.json`, but `from_pretrained` does not apply them.  Repeated
    calls have no further effect.

    ```python
    fastreg.layerwise.set_dropout(model, LinearLayers(0.1, 0.02))
    model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    fastreg.layerwise.restore(model)
    ```

    Args:
        model: A model with a `config`, of the class that was saved or with another head.
        strict: Whether every saved rate must have a site in the model.

    Returns:
        The rates that were set; empty if none were saved.

    Raises:
        ValueError: If the model has no site for a rate.
    """
    model = unwrap_model(model)
    kept = dict(getattr(getattr(model, "config", None), FIELD, None) or {}).get("dropout", {})
    here = {site.path: site for site in [*injection_sites(model), *dropout_sites(model)]}
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
            f"{type(model).__name__} has no dropout site for the saved rates of {', '.join(missing)}: load "
            "the class that was saved, or give strict=False"
        )
    sites = [site for path, site in here.items() if path in rates]
    return write(model, sites, rates) if rates else DropoutTable(())


def remove(model: nn.Module) -> None:
    """Undoes all changes of `set_dropout`, `restore` and `DropoutScheduler`.

    Rates, modules, hooks and the configuration are those of the original model again.

    Args:
        model: Any model.
    """
    model = unwrap_model(model)
    here = {site.path: site for site in dropout_sites(model)}
    for path, before in vars(model).pop(ORIGINAL, {}).items():
        site = here[path]
        if isinstance(before, nn.Module):
            replace(model, site.owner, before)
        else:
            setattr(site.owner, site.attribute, before)
    for module in list(model.modules()):
        detach(module)
    vars(getattr(model, "config", model)).pop(FIELD, None)


def record_undo(model: nn.Module) -> Callable[[], None]:
    """Returns a function that undoes later changes of the rates, but not earlier ones."""
    model = unwrap_model(model)
    changed, config = vars(model).get(ORIGINAL, {}), getattr(model, "config", None)
    saved = copy.deepcopy(getattr(config, FIELD, None))  # by a checkpoint, even without `restore`
    before = {
        site.path: site.rate
        for site in dropout_sites(model)
        if site.path in changed or site.path.endswith(INJECTED)
    }

    def undo() -> None:
        remove(model)
        if before:
            here = {site.path: site for site in [*injection_sites(model), *dropout_sites(model)]}
            write(model, [here[path] for path in before], before)
        if saved is not None:
            setattr(config, FIELD, saved)

    return undo


def _replacement(site: DropoutSite, rate: float) -> nn.Module | None:
    """Returns a module of fastreg to replace the site's with, `None` if it stays."""
    module = site.owner
    if site.kind == "identity":
        return fastreg_nn.DropPath(rate) if site.role == "path" else fastreg_nn.Dropout(rate)
    if site.kind == "path" and not isinstance(module, fastreg_nn.DropPath) and hasattr(module, "drop_prob"):
        return fastreg_nn.DropPath(rate, bool(getattr(module, "scale_by_keep", True)))
    if site.kind == "module" and type(module) in FUSED and not site.is_number:
        return FUSED[type(module)](rate, inplace=module.inplace)
    return None


def _how(site: DropoutSite) -> str:
    if site.path.endswith(INJECTED):
        return "injected"
    return site.kind if site.kind == "config" else "float" if site.is_number else "module"


def injection_sites(model: nn.Module) -> Iterator[DropoutSite]:
    """Yields the sites behind attention and MLP where dropout could be added."""
    for block, (stack, layer, layers) in block_positions(model).items():
        for name in branches(model.get_submodule(block)):
            owner = model.get_submodule(f"{block}.{name}")
            yield DropoutSite(
                f"{block}.{name}.{INJECTED}", "hidden", stack, layer, layers, "injected", owner, "p"
            )
