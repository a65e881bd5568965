"""Finds the dropout sites of a model: every rate that can be set, its path, and its role.

A site is one of
- a module: `nn.Dropout` and its variants, `DropPath` under any name, or an `nn.Identity` in place of one;
- a number that its module passes to a function, such as the `attention_dropout` of LLaMA's attention;
- the `layerdrop` of a configuration that is read in forward passes.

Roles follow from names here.  `audit` finds them by running the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ..common.blocks import stacks
from ..common.unwrap import unwrap_model
from ..nn import BiasActDropout
from ..nn.dropout import _DropoutBase
from ..nn.fused import _FusedDropoutBase

ROLES = ("hidden", "attention", "activation", "embedding", "head", "path", "layerdrop", "adapter")
"""Roles of dropout: outputs of attention and MLP, attention probabilities, activations between the two linear
layers of an MLP, embeddings, outputs of the last block, residual branches, whole layers, inputs of LoRA."""

INJECTED = "fastreg_dropout"
"""The name of modules that fastreg adds."""

HEADS = ("classif", "head", "pool", "summary", "final", "last", "score")


@dataclass(eq=False)
class DropoutSite:
    """A dropout rate of a model that can be set.

    Attributes:
        path: The module's name in the model, followed by the attribute's if the site is a number.
        role: One of `ROLES`.
        stack: The name of the list of blocks that contains it, or "".
        layer: The index of its block in the stack, or `None`.
        layers: The number of blocks in its stack, or in the longest stack if it is in none.
        kind: `"module"`, `"path"`, `"identity"`, `"fused"`, `"float"` or `"config"`.
        owner: The object with the attribute.
        attribute: The name of the attribute.
        uses: How often the rate was used in one forward pass; `None` if none was run.
        called: Whether it is a module that ran in that pass.
    """

    path: str
    role: str
    stack: str
    layer: int | None
    layers: int
    kind: str
    owner: Any
    attribute: str
    uses: int | None = None
    called: bool = field(default=False, repr=False)

    @property
    def rate(self) -> Any:
        """The present rate: a float, or the module's own value, such as one rate for each channel."""
        rate = None if self.kind == "identity" else getattr(self.owner, self.attribute)
        return 0.0 if rate is None else rate

    @property
    def position(self) -> int:
        """The layer whose rate it gets: its own, the last for a head, the first for embeddings."""
        if self.layer is not None:
            return self.layer
        return max(self.layers - 1, 0) if self.role == "head" else 0

    @property
    def is_number(self) -> bool:
        """Whether its rate is passed to functions as a Python float, a constant for `torch.compile`.

        This includes modules that never run but whose rate is read, as for attention in GPT-2 and BERT.
        """
        read = not self.called if self.uses else self.role == "attention"
        return self.kind in ("float", "config") or (self.kind == "module" and read)


def dropout_sites(model: nn.Module) -> list[DropoutSite]:
    """Returns the dropout sites of a model, in the order of its modules, with roles by name.

    See `audit` for roles by what a forward pass does.

    Args:
        model: Any model, which may be wrapped.
    """
    model = unwrap_model(model)
    positions = block_positions(model)
    longest = max((layers for _, _, layers in positions.values()), default=0)
    sites = []
    for path, owner, attribute, kind in _all(model):
        block = path
        while block and block not in positions:
            block = block.rpartition(".")[0]
        stack, layer, layers = positions.get(block, ("", None, longest))
        role = _named_role(path, owner, kind, layer is not None or not positions)
        sites.append(DropoutSite(path, role, stack, layer, layers, kind, owner, attribute))
    return sites


def block_positions(model: nn.Module) -> dict[str, tuple[str, int, int]]:
    """Returns the stack of each block by its name, with its index there and the number of blocks."""
    result: dict[str, tuple[str, int, int]] = {}
    # The share includes a vision tower of 0.3 billion parameters beside 7 billion, but not a list of heads.
    for stack in stacks(model, share=0.005):
        parents = zip(*(name.split(".")[:-1] for name, _ in stack), strict=False)
        common = takewhile(lambda parts: len(set(parts)) == 1, parents)
        label = ".".join(parts[0] for parts in common)
        result |= {name: (label, i, len(stack)) for i, (name, _) in enumerate(stack)}
    return result


def _all(model: nn.Module) -> Iterator[tuple[str, Any, str, str]]:
    seen_layerdrop = False
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        kind = _kind(module, name)
        if kind:
            attribute = "drop_prob" if hasattr(module, "drop_prob") else "p"
            yield path, module, attribute, kind
            continue
        for attribute, value in vars(module).items():
            if "drop" in attribute.lower() and _is_rate(value):
                seen_layerdrop |= "layerdrop" in attribute
                yield f"{path}.{attribute}".lstrip("."), module, attribute, "float"
    config = getattr(model, "config", None)
    for attribute, value in () if config is None or seen_layerdrop else vars(config).items():
        if attribute.endswith("layerdrop") and _is_rate(value):
            yield f"config.{attribute}", config, attribute, "config"


def _kind(module: nn.Module, name: str) -> str | None:
    label = type(module).__name__.lower()
    if isinstance(module, _FusedDropoutBase):
        return "fused"
    if isinstance(module, nn.Identity):
        return "identity" if "drop" in name.lower() else None
    if isinstance(module, (_DropoutNd, _DropoutBase)) and not hasattr(module, "drop_prob"):
        return "module"
    if any(True for _ in module.children()) or not (hasattr(module, "drop_prob") or hasattr(module, "p")):
        return None
    if "droppath" in label or "stochasticdepth" in label:
        return "path"
    return "module" if "dropout" in label else None


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _named_role(path: str, owner: Any, kind: str, inside: bool) -> str:
    parent, _, name = path.lower().rpartition(".")
    label = "" if kind != "float" else type(owner).__name__.lower()
    if "layerdrop" in name:
        return "layerdrop"
    if kind == "path" or (kind == "identity" and "path" in name):
        return "path"
    if "lora_" in path:
        return "adapter"
    if isinstance(owner, BiasActDropout):
        return "activation"
    if not inside:
        return "head" if any(word in path.lower() for word in HEADS) else "embedding"
    if name == INJECTED or isinstance(owner, _FusedDropoutBase):
        return "hidden"
    if "attention" in label or name.startswith(("attn_", "attention_")) or parent.endswith("attention.self"):
        return "attention"
    return "activation" if "activation" in name or "intermediate" in name else "hidden"
