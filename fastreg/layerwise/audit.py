"""One forward pass that tells what each dropout knob does.

Every knob gets a rate of its own, k / 2^20.  The model runs once in training mode, and each call that drops
names by its rate the knob behind it.  Nothing is really dropped: whoever calls gets the input back.  What is
dropped follows from the way of the data: attention probabilities come out of a softmax, or go to a function
of attention; what a linear map takes next stands between the two maps of an MLP; the rest are outputs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from .inputs import candidates
from .knobs import INJECTED, Knob, knobs, places, unwrapped
from .table import aligned

UNIT = 2.0**-20
_MHA = inspect.signature(F.multi_head_attention_forward)
_SDPA = inspect.Signature(
    [
        inspect.Parameter(name, kind, default=inspect.Parameter.empty)
        for names, kind in (
            ("query key value attn_mask dropout_p is_causal", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            ("scale enable_gqa", inspect.Parameter.KEYWORD_ONLY),
        )
        for name in names.split()
    ]
)
DROPOUTS = {
    F.dropout, F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout,
    torch.dropout_, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout,
}  # fmt: skip
LINEAR = {"linear", "addmm", "conv1d", "conv2d"}
SAME_DATA = {
    "to", "type_as", "float", "half", "bfloat16", "view", "reshape", "transpose", "permute", "contiguous",
    "flatten", "unflatten", "squeeze", "unsqueeze", "view_as",
}  # fmt: skip
OPAQUE = {
    "flash_attention_2": True,
    "flash_attention_3": False,
    "flash_attention_4": False,
    "flex_attention": False,
}
"""Functions of attention that torch does not show, and whether they heed a rate."""


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


@dataclass
class _Use:
    """One call that drops."""

    knob: Knob
    attention: bool
    blocks: int
    """How many blocks had begun."""
    linear: bool = False
    """Whether a linear map takes what comes out."""


class _Recorder(TorchFunctionMode):
    """Notes each call that drops, and lets it drop nothing."""

    def __init__(self, model: nn.Module, by_rate: dict[float, Knob]) -> None:
        super().__init__()
        self.model, self.by_rate = model, by_rate
        self.names = {module: name for name, module in model.named_modules()}
        self.begins = {model.get_submodule(name) for name in places(model)}
        self.fused = {knob.owner: rate for rate, knob in by_rate.items() if knob.kind == "fused"}
        self.uses: list[_Use] = []
        self.unknown: list[tuple[float, str]] = []
        self.blocks = self.attending = 0
        self.inside: list[nn.Module] = []
        self.ran: set[Any] = set()
        self.origin = WeakIdKeyDictionary()  # of a tensor: "softmax", or the use that it came out of

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func in DROPOUTS:
            x, rate, training = _dropout_arguments(func, args, kwargs)
            out = x.view_as(x)
            if training and rate:
                self.origin[out] = self.note(rate, self.attending > 0 or self.origin.get(x) == "softmax")
            return out
        if func is F.scaled_dot_product_attention:
            args, kwargs = self._attention(_SDPA, args, kwargs)
        elif func is F.multi_head_attention_forward:
            args, kwargs = self._attention(_MHA, args, kwargs)
        tensors = [a for a in args if isinstance(a, Tensor)]
        if name in LINEAR:
            for use in filter(None, map(self.origin.get, tensors)):
                if use != "softmax":
                    use.linear = True
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            if name == "softmax":
                self.origin[out] = "softmax"
            elif name in SAME_DATA and tensors and tensors[0] in self.origin:
                self.origin[out] = self.origin[tensors[0]]
        return out

    def _attention(self, signature: inspect.Signature, args: Any, kwargs: Any) -> tuple[Any, Any]:
        bound = signature.bind_partial(*args, **kwargs)
        rate = bound.arguments.get("dropout_p", 0.0)
        if rate and bound.arguments.get("training", True):
            self.note(rate, True)
        position = list(signature.parameters).index("dropout_p")
        if len(args) > position:
            return (*args[:position], 0.0, *args[position + 1 :]), kwargs
        return args, {**kwargs, "dropout_p": 0.0}

    def note(self, rate: float, attention: bool) -> _Use | None:
        knob = self.by_rate.get(rate)
        if knob is None:
            self.unknown.append((rate, self.names.get(self.inside[-1], "") if self.inside else ""))
            return None
        self.uses.append(_Use(knob, attention, self.blocks))
        return self.uses[-1]

    def interface(self, get_interface: Any) -> Any:
        """In place of transformers' `get_interface`, which hands out functions of attention."""

        def wrapped(mapping: Any, implementation: Any, default: Any) -> Any:
            function = get_interface(mapping, implementation, default)

            @functools.wraps(function)
            def attend(*args: Any, **kwargs: Any) -> Any:
                if implementation in OPAQUE:  # what they drop is not seen
                    rate, kwargs["dropout"] = kwargs.get("dropout", 0.0), 0.0
                    if rate and OPAQUE[implementation]:
                        self.note(rate, True)
                self.attending += 1
                try:
                    return function(*args, **kwargs)
                finally:
                    self.attending -= 1

            return attend

        return wrapped

    def entering(self, module: nn.Module, args: Any) -> None:
        """Before a module runs."""
        self.inside.append(module)
        self.ran.add(module)
        self.blocks += module in self.begins
        if module in self.fused:
            self.note(self.fused[module], False)

    def leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a module ran."""
        self.inside.pop()

    def conclude(self) -> None:
        """Give the knobs their uses and roles."""
        roles: dict[Knob, Counter[str]] = {knob: Counter() for knob in self.by_rate.values()}
        for use in self.uses:
            roles[use.knob][self._role(use)] += 1
        for knob, counts in roles.items():
            if knob.role == "layerdrop":  # decides by a random number of its own
                continue
            knob.uses, knob.called = sum(counts.values()), knob.owner in self.ran
            if counts and knob.role not in ("path", "adapter") and knob.kind != "fused":
                # XLNet drops probabilities and outputs with one module: outputs count.
                knob.role = next(
                    (r for r in ("hidden", "activation") if r in counts), counts.most_common(1)[0][0]
                )

    def _role(self, use: _Use) -> str:
        knob = use.knob
        if use.attention:
            return "attention"
        if knob.path.endswith(INJECTED):
            return knob.role
        if knob.layer is None and self.blocks:
            return "embedding" if use.blocks < self.blocks else "head"
        if use.linear and not self._in_attention(knob):
            return "activation"
        return "hidden" if knob.layer is not None or knob.role != "head" else "head"

    def _in_attention(self, knob: Knob) -> bool:
        owner = self.model.get_submodule(knob.path.rpartition(".")[0])
        return "attention" in type(owner).__name__.lower()


def _run(model: nn.Module, found: list[Knob], args: Any, kwargs: Any) -> _Recorder:
    by_rate = {(i + 1) * UNIT: knob for i, knob in enumerate(found)}
    recorder = _Recorder(model, by_rate)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_unchanged(model))
        for rate, knob in by_rate.items():
            stack.enter_context(_sentinel(knob, rate))
        stack.callback(register_module_forward_pre_hook(recorder.entering).remove)
        stack.callback(register_module_forward_hook(recorder.leaving).remove)
        stack.enter_context(_attention_functions(recorder))
        if any(module._compiled_call_impl is not None for module in recorder.names):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        stack.enter_context(recorder)
        model.train()
        model(*args, **kwargs)
    return recorder


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Random states, training flags and buffers are as before afterwards."""
    training = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    numpy = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for module, flag in training.items():
            module.training = flag


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
def _attention_functions(recorder: _Recorder) -> Iterator[None]:
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


def _dropout_arguments(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, float, bool]:
    if inspect.isfunction(func):
        given = inspect.signature(func).bind(*args, **kwargs)
        given.apply_defaults()
        return given.arguments["input"], given.arguments["p"], given.arguments["training"]
    x, rate, train = [*args, *kwargs.values()][:3]
    return x, rate, train


def _tuple(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def _plain(rate: Any) -> bool:
    return isinstance(rate, (int, float))
