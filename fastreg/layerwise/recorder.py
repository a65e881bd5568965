"""Records the dropout calls of a forward pass, with their rates and inputs."""

import functools
import inspect
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from .sites import INJECTED, DropoutSite, block_positions

_MHA = inspect.signature(F.multi_head_attention_forward)
_SDPA = inspect.signature(
    lambda query, key, value, attn_mask, dropout_p, is_causal, *, scale, enable_gqa: None
)  # fmt: skip
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
"""Attention functions that torch's overrides do not see, and whether they use the dropout rate."""


@dataclass
class _Use:
    """One dropout call."""

    site: DropoutSite
    attention: bool
    blocks: int
    """The number of blocks that had begun."""
    linear: bool = False
    """Whether its output is the input of a linear layer."""


class Recorder(TorchFunctionMode):
    """Records each dropout call, and returns its input unchanged."""

    def __init__(self, model: nn.Module, by_rate: dict[float, DropoutSite]) -> None:
        super().__init__()
        self.model, self.by_rate = model, by_rate
        self.names = {module: name for name, module in model.named_modules()}
        self.begins = {model.get_submodule(name) for name in block_positions(model)}
        self.fused = {site.owner: rate for rate, site in by_rate.items() if site.kind == "fused"}
        self.uses: list[_Use] = []
        self.unknown: list[tuple[float, str]] = []
        self.blocks = self.attending = 0
        self.inside: list[nn.Module] = []
        self.ran: set[Any] = set()
        self.origin = WeakIdKeyDictionary()  # of a tensor: "softmax", or the dropout call that made it

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
        """Records a dropout call with this rate."""
        site = self.by_rate.get(rate)
        if site is None:
            self.unknown.append((rate, self.names.get(self.inside[-1], "") if self.inside else ""))
            return None
        self.uses.append(_Use(site, attention, self.blocks))
        return self.uses[-1]

    def interface(self, get_interface: Any) -> Any:
        """Wraps `get_interface` of transformers, which returns attention functions."""

        def wrapped(mapping: Any, implementation: Any, default: Any) -> Any:
            function = get_interface(mapping, implementation, default)

            @functools.wraps(function)
            def attend(*args: Any, **kwargs: Any) -> Any:
                if implementation in OPAQUE:  # their dropout is not seen
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
        """Records that a module begins; a forward pre-hook."""
        self.inside.append(module)
        self.ran.add(module)
        self.blocks += module in self.begins
        if module in self.fused:
            self.note(self.fused[module], False)

    def leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        """Records that a module has ended; a forward hook."""
        self.inside.pop()

    def conclude(self) -> None:
        """Sets the uses and roles of all sites."""
        roles: dict[DropoutSite, Counter[str]] = {site: Counter() for site in self.by_rate.values()}
        for use in self.uses:
            roles[use.site][self._role(use)] += 1
        for site, counts in roles.items():
            if site.role == "layerdrop":  # layers are skipped by a random number, not by a dropout call
                continue
            site.uses, site.called = sum(counts.values()), site.owner in self.ran
            if counts and site.role not in ("path", "adapter") and site.kind != "fused":
                # XLNet drops probabilities and outputs by one module, whose role is that of outputs.
                site.role = next(
                    (r for r in ("hidden", "activation") if r in counts), counts.most_common(1)[0][0]
                )

    def _role(self, use: _Use) -> str:
        site = use.site
        if use.attention:
            return "attention"
        if site.path.endswith(INJECTED):
            return site.role
        if site.layer is None and self.blocks:
            return "embedding" if use.blocks < self.blocks else "head"
        if use.linear:
            owner = self.model.get_submodule(site.path.rpartition(".")[0])
            if "attention" not in type(owner).__name__.lower():
                return "activation"
        return "hidden" if site.layer is not None or site.role != "head" else "head"


def _dropout_arguments(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, float, bool]:
    if inspect.isfunction(func):
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments["input"], bound.arguments["p"], bound.arguments["training"]
    x, rate, train = [*args, *kwargs.values()][:3]
    return x, rate, train
