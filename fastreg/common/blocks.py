"""The repeated layers of a transformer, found by their form: no architecture is known by name.

Blocks stand in an `nn.ModuleList` or `nn.Sequential` whose children are of one class.  The outermost such
list counts, unless its children are stages, which hold little but a list of blocks themselves.  Encoders and
decoders have a stack each.
"""

from __future__ import annotations

from torch import nn

Block = tuple[str, nn.Module]
_LISTS = (nn.ModuleList, nn.Sequential)


def stacks(model: nn.Module, share: float = 0.1) -> list[list[Block]]:
    """The stacks of a model: for each, names and modules of its blocks in order.

    The stages of a hierarchical model make one stack.  What has less than a tenth of the parameters of the
    largest stack is none, such as a list of small heads.

    Args:
        model: Any model.
        share: What counts as a stack: this share of the parameters of the largest, or more.

    Returns:
        The stacks in the order of registration; none if nothing is repeated.
    """
    found = _stacks(model, "")
    sizes = [sum(map(_size, (block for _, block in stack))) for stack in found]
    return [stack for stack, size in zip(found, sizes, strict=True) if size and size >= share * max(sizes)]


def _stacks(module: nn.Module, name: str) -> list[list[Block]]:
    children = [(f"{name}.{key}".lstrip("."), child) for key, child in module.named_children()]
    if isinstance(module, _LISTS) and len({type(child) for _, child in children}) == 1:
        stages = [_stage(child, key) for key, child in children]
        if all(stages):
            return [[block for stage in stages for block in stage]]
        # A list of one counts as well: a model of one layer is none without layers.
        if len(children) > 1 or (isinstance(module, nn.ModuleList) and list(children[0][1].children())):
            return [children]
    return [stack for key, child in children for stack in _stacks(child, key)]


def _stage(module: nn.Module, name: str) -> list[Block]:
    """The blocks of a stage; none where the module is a block, whose own lists are something else."""
    lists = {key: child for key, child in module.named_children() if isinstance(child, _LISTS) and len(child)}
    for key, child in lists.items():
        # Beside its blocks a stage may change the resolution, but has no attention and no norm of its own.
        beside = {name for name, _ in module.named_children()} - lists.keys()
        if (
            len({type(block) for block in child}) == 1
            and any(True for _ in child[0].children())
            and 2 * _size(child) > _size(module)
            and all("sampl" in other or "merg" in other for other in beside)
        ):
            return [(f"{name}.{key}.{i}", block) for i, block in enumerate(child)]
    return []


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
