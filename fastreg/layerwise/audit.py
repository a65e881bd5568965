"""Finds by one forward pass which dropout sites a model uses, and for what.

Each site gets a different rate, k / 2^20.  The model runs once in training mode, and the rate of each dropout
call identifies its site.  Dropout calls return their input unchanged.  Roles follow from the data: attention
probabilities are the output of a softmax or are dropped inside an attention function; activations are the
input of a linear layer; the rest are outputs.
"""

import contextlib
import functools
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ..common.module_state import devices_of, preserve_buffers, preserve_modes, preserve_rng
from ..common.unwrap import unwrap_model
from .inputs import candidates
from .recorder import Recorder
from .sites import DropoutSite, dropout_sites
from .table import aligned

UNIT = 2.0**-20


@dataclass(frozen=True)
class Audit:
    """The dropout of a model as found by a forward pass.

    Attributes:
        sites: All sites; `uses` is the number of uses of each, 0 for unused ones.
        unknown: Rates that belong to no site, with the name of the module whose code contains them.
        reason: Why no forward pass was run, or "". Without one, roles are by name, and `uses` is `None`.
    """

    sites: tuple[DropoutSite, ...]
    unknown: tuple[tuple[float, str], ...] = ()
    reason: str = ""

    @property
    def knobs(self) -> tuple[DropoutSite, ...]:
        """All sites: an alias of `sites` for one release."""
        return self.sites

    def __str__(self) -> str:
        lines = [("path", "role", "layer", "rate", "uses")]
        for site in self.sites:
            layer, uses = ("-" if x is None else str(x) for x in (site.layer, site.uses))
            rate = f"{site.rate:g}" if isinstance(site.rate, (int, float)) else "many"
            lines.append((site.path, site.role, layer, rate, uses))
        lines += [(path, "in the code", "-", f"{rate:g}", "1") for rate, path in self.unknown]
        return aligned(lines) + (f"\nroles by name: {self.reason}" if self.reason else "")


def audit(model: nn.Module, inputs: Any = None) -> Audit:
    """Finds the dropout sites of a model and, by one forward pass, the role of each.

    Random states, modes, rates and buffers are restored.  Supports all kinds of attention (`"eager"`,
    `"sdpa"`, `"flash_attention_2"`) and compiled models, which run eagerly here.

    ```python
    print(fastreg.layerwise.audit(model))
    ```

    Args:
        model: Any model.
        inputs: Inputs of the model: a tensor, a tuple, or a dict of keyword arguments.  By default small
            inputs are made from its configuration; if none fit, roles follow from names.

    Raises:
        Exception: Errors of the model with these inputs.
    """
    model = unwrap_model(model)
    if inputs is None:
        calls = list(candidates(model))
    elif isinstance(inputs, dict):
        calls = [((), inputs)]
    else:
        calls = [(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {})]
    reason = f"no inputs are known for {type(model).__name__}: give inputs="
    for args, kwargs in calls:
        sites = dropout_sites(model)
        try:
            recorder = _run(model, sites, args, kwargs)
        except Exception as error:
            if inputs is not None:
                raise
            message = str(error).partition("\n")[0]
            reason = f"made-up inputs did not fit ({type(error).__name__}: {message}): give inputs="
            continue
        recorder.conclude()
        return Audit(tuple(sites), tuple(recorder.unknown))
    return Audit(tuple(dropout_sites(model)), reason=reason)


def _run(model: nn.Module, sites: list[DropoutSite], args: Any, kwargs: Any) -> Recorder:
    by_rate = {(i + 1) * UNIT: site for i, site in enumerate(sites)}
    recorder = Recorder(model, by_rate)
    numpy = sys.modules.get("numpy")
    interface: Any = getattr(sys.modules.get("transformers.modeling_utils"), "AttentionInterface", None)
    with contextlib.ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        if numpy is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.enter_context(preserve_rng(devices_of(model)))
        stack.enter_context(preserve_modes(model, True))
        stack.enter_context(preserve_buffers(model.modules()))
        for rate, site in by_rate.items():
            stack.enter_context(_sentinel(site, rate))
        stack.callback(register_module_forward_pre_hook(recorder.entering).remove)
        stack.callback(register_module_forward_hook(recorder.leaving).remove)
        if hasattr(interface, "get_interface"):
            stack.callback(setattr, interface, "get_interface", interface.get_interface)
            interface.get_interface = recorder.interface(interface.get_interface)
        if any(module._compiled_call_impl is not None for module in recorder.names):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        stack.enter_context(recorder)
        model(*args, **kwargs)
    return recorder


@contextlib.contextmanager
def _sentinel(site: DropoutSite, rate: float) -> Iterator[None]:
    """Sets the rate of a site for the block; modules with their own implementation call torch's dropout."""
    module, before = site.owner, None
    forward = vars(module).get("forward")
    plain = site.kind in ("float", "config", "fused") or type(module).__module__ == _DropoutNd.__module__
    if site.kind != "identity":
        before = getattr(module, site.attribute)
        setattr(module, site.attribute, 0.0 if site.role == "layerdrop" else rate)
    if not plain:
        module.forward = functools.partial(_dropout, rate)
    try:
        yield
    finally:
        if site.kind != "identity":
            setattr(module, site.attribute, before)
        if not plain:
            del module.forward
        if forward is not None:
            module.forward = forward


def _dropout(rate: float, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.dropout(x, rate, True)
