"""Parameter groups: weight decay and learning rates by kind of parameter and depth of its layer."""

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from ..common.blocks import stacks
from ..common.validation import check_choice, check_range


def param_groups(
    model: nn.Module, weight_decay: float | Callable[[float], float] = 0.01, lr: float | None = None,
    lr_decay: float | None = None, *, perturb: str = "all", adaptive: str | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Returns the parameter groups of a model, for fastreg's optimizers and torch's.

    Biases, parameters of norms and all with less than two dimensions do not decay.  Frozen parameters are
    included, so that unfreezing them later is enough; tied ones appear once, where they are first.

    Layers have a depth: 0 for all before the blocks, such as embeddings, 1 to L for the blocks, L + 1 for all
    after them, such as the final norm and the head.  `fastreg.common.blocks.stacks` finds the blocks.

    Args:
        model: The model.
        weight_decay: The rate, or a function of the depth as a share of L + 1, from embeddings to head.
        lr: Learning rate of the last layers, put into the groups.
        lr_decay: Layerwise decay of the learning rate, in (0, 1]: lr · lr_decay^(L + 1 - depth).
        perturb: What `SAM` perturbs, `"all"` or `"norms"` only (SAM-ON): the others get a `rho` of 0.
        adaptive: With `"weights"`, parameters that do not decay get `adaptive=False`: ASAM scales by the
            weights of the others alone.

    Returns:
        Groups with `params`, `weight_decay`, `name` and, if passed, `lr`: by depth, decayed ones first.

    Raises:
        TypeError: If the model is not a module.
        ValueError: For values out of range, for a model without parameters, and for one without repeated
            layers where depth matters.

    Reference:
        Clark et al. 2020, "ELECTRA"; Bao et al. 2022, "BEiT"; Mueller et al. 2023, "Normalization layers are
        all that sharpness-aware minimization needs".
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups() takes a model, not its parameters, got {type(model).__name__}")
    if lr is not None:
        check_range("lr", lr, 0)
    if lr_decay is not None:
        check_range("lr_decay", lr_decay, 0, 1, above=True)
    if lr_decay is not None and lr is None:
        raise ValueError(f"lr_decay needs the learning rate of the last layers: give lr=, got {lr=}")
    check_choice("perturb", perturb, ("all", "norms"))
    check_choice("adaptive", adaptive, (None, "weights"))
    layered = lr_decay is not None or callable(weight_decay)
    depth_of, last = depths(model)
    if layered and last < 2:
        raise ValueError(
            f"found no repeated layers in {type(model).__name__}: give weight_decay as a number, no lr_decay"
        )
    if not depth_of:
        raise ValueError(f"{type(model).__name__} has no parameters")
    norm_layers = (module for module in model.modules() if "norm" in type(module).__name__.lower())
    norms = {id(p) for module in norm_layers for p in module.parameters(recurse=False)}
    ends = {0: "before the blocks", last: "after the blocks" if layered else "all layers"}
    groups: dict[tuple[int, bool, bool], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        depth = depth_of[name] if layered else last
        exempt = p.dim() < 2 or id(p) in norms or name.endswith("bias")
        still = perturb == "norms" and id(p) not in norms
        if (depth, exempt, still) not in groups:
            rate = _rate(weight_decay, depth / last)
            where = ends.get(depth, f"block {depth}")
            group = {"params": [], "weight_decay": rate, "name": where}
            if exempt:
                group |= {"weight_decay": 0.0, "name": f"{where}, no decay"}
                group |= {"adaptive": False} if adaptive == "weights" else {}
            if still:
                group |= {"rho": 0.0, "name": f"{group['name']}, not perturbed"}
            if lr is not None:
                group["lr"] = lr * (lr_decay or 1.0) ** (last - depth)
            groups[depth, exempt, still] = group
        groups[depth, exempt, still]["params"].append(p)
    return [groups[key] for key in sorted(groups)]


def depths(model: nn.Module) -> tuple[dict[str, int], int]:
    """Returns the depth of every parameter by name, and the depth after the blocks (1 without blocks).

    A parameter outside of all blocks belongs to the stack nearest to it in the tree of modules: an encoder's
    final norm comes after the encoder's blocks, a decoder's embedding before the decoder's.
    """
    all_stacks = stacks(model)
    last = max(map(len, all_stacks), default=0) + 1
    names = [name for name, _ in model.named_parameters()]
    result: dict[str, int] = {}
    starts = []
    for stack in all_stacks:
        blocks = list(enumerate(stack, 1))
        inside = {name: i for i, (block, _) in blocks for name in names if name.startswith(f"{block}.")}
        starts.append((stack[0][0].split("."), min(map(names.index, inside), default=0)))
        result |= inside
    for index, name in enumerate(names):
        if name not in result:
            near = [_common(name.split("."), path) for path, _ in starts]
            nearest = [start for (_, start), n in zip(starts, near, strict=True) if n == max(near)]
            result[name] = last if nearest and index > max(nearest) else 0
    return result, last


def _common(a: list[str], b: list[str]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _rate(weight_decay: float | Callable[[float], float], depth: float) -> float:
    rate = weight_decay(depth) if callable(weight_decay) else weight_decay
    if not 0 <= rate < math.inf:
        where = f" at depth {depth:g}" if callable(weight_decay) else ""
        raise ValueError(f"weight_decay must be finite and >= 0, got {rate!r}{where}")
    return float(rate)
