"""One forward pass that tells what each dropout knob does.

Every knob gets a rate of its own, k / 2^20.  The model runs once in training mode, and each call that drops
names by its rate the knob behind it.  Nothing is really dropped: whoever calls gets the input back.  What is
dropped follows from the way of the data: attention probabilities come out of a softmax, or go to a function
of attention; what a linear map takes next stands between the two maps of an MLP; the rest are outputs.
"""

from __future__ import annotations

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
from .inputs import candidates
from .knobs import Knob, knobs, unwrapped
from .recorder import Recorder
from .table import aligned

UNIT = 2.0**-20


@dataclass(frozen=True)
class Audit:
    """What a forward pass told.

    Attributes:
        knobs: All knobs; `uses` says how often each was used, 0 if never.
        unknown: Rates used that belong to no knob, with the name of the module: they stand in its code.
        reason: Why no forward pass was run, or "": roles are by name then, and `uses` is `None`.
    """

    knobs: tuple[Knob, ...]
    unknown: tuple[tuple[float, str], ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        lines = [("path", "role", "layer", "rate", "uses")]
        for k in self.knobs:
            layer, uses = ("-" if x is None else str(x) for x in (k.layer, k.uses))
            lines.append((k.path, k.role, layer, f"{k.rate:g}" if _plain(k.rate) else "many", uses))
        lines += [(path, "in the code", "-", f"{rate:g}", "1") for rate, path in self.unknown]
        return aligned(lines) + (f"\nroles by name: {self.reason}" if self.reason else "")


def audit(model: nn.Module, inputs: Any = None) -> Audit:
    """Finds the dropout knobs of a model and, by one forward pass, what each does.

    Random states, training flags, rates and buffers are as before afterwards.  Works with every kind of
    attention (`"eager"`, `"sdpa"`, `"flash_attention_2"`) and on compiled models, which run eagerly here.

    ```python
    print(fastreg.layerwise.audit(model))
    ```

    Args:
        model: Any model.
        inputs: What to call it with: a tensor, a tuple, or a dict of keyword arguments.  By default small
            inputs are made from its configuration; where none fit, roles follow from names.

    Raises:
        Exception: What the model raises on the given inputs.
    """
    model = unwrapped(model)
    if inputs is None:
        calls = list(candidates(model))
    else:
        calls = [((), dict(inputs)) if isinstance(inputs, dict) else (_tuple(inputs), {})]
    reason = f"no inputs are known for {type(model).__name__}: give inputs="
    for args, kwargs in calls:
        found = knobs(model)
        try:
            recorder = _run(model, found, args, kwargs)
        except Exception as error:
            if inputs is not None:
                raise
            message = str(error).partition("\n")[0]
            reason = f"made-up inputs did not fit ({type(error).__name__}: {message}): give inputs="
            continue
        recorder.conclude()
        return Audit(tuple(found), tuple(recorder.unknown))
    return Audit(tuple(knobs(model)), reason=reason)


def _run(model: nn.Module, found: list[Knob], args: Any, kwargs: Any) -> Recorder:
    by_rate = {(i + 1) * UNIT: knob for i, knob in enumerate(found)}
    recorder = Recorder(model, by_rate)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_training(model))
        for rate, knob in by_rate.items():
            stack.enter_context(_sentinel(knob, rate))
        stack.callback(register_module_forward_pre_hook(recorder.entering).remove)
        stack.callback(register_module_forward_hook(recorder.leaving).remove)
        stack.enter_context(_attention_functions(recorder))
        if any(module._compiled_call_impl is not None for module in recorder.names):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        stack.enter_context(recorder)
        model(*args, **kwargs)
    return recorder


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Sets training mode for the block; modes, buffers and random states are restored after it."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with preserve_rng(devices_of(model)), preserve_modes(model, True), preserve_buffers(model.modules()):
            yield
    finally:
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])


@contextlib.contextmanager
def _sentinel(knob: Knob, rate: float) -> Iterator[None]:
    """The knob has this rate, and its module shows it to torch where it drops by itself."""
    module, before = knob.owner, None
    forward = vars(module).get("forward")
    plain = knob.kind in ("float", "config", "fused") or type(module).__module__ == _DropoutNd.__module__
    if knob.kind != "identity":
        before = getattr(module, knob.attribute)
        setattr(module, knob.attribute, 0.0 if knob.role == "layerdrop" else rate)
    if not plain:
        module.forward = functools.partial(_shown, rate)
    try:
        yield
    finally:
        if knob.kind != "identity":
            setattr(module, knob.attribute, before)
        if not plain:
            del module.forward
        if forward is not None:
            module.forward = forward


def _shown(rate: float, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.dropout(x, rate, True)


@contextlib.contextmanager
def _attention_functions(recorder: Recorder) -> Iterator[None]:
    utils = sys.modules.get("transformers.modeling_utils")
    interface: Any = getattr(utils, "AttentionInterface", None)
    if interface is None or not hasattr(interface, "get_interface"):
        yield
        return
    before = interface.get_interface
    interface.get_interface = recorder.interface(before)
    try:
        yield
    finally:
        interface.get_interface = before


def _tuple(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def _plain(rate: Any) -> bool:
    return isinstance(rate, (int, float))
