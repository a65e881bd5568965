"""Finds the repeated layers of a transformer by their structure, not by the name of an architecture.

Blocks are the children of an `nn.ModuleList` or `nn.Sequential`, all of one class.  The outermost such list
counts, unless its children are stages, which consist mostly of a list of blocks.  An encoder and a decoder
have a stack each.
"""

from torch import nn

Block = tuple[str, nn.Module]
_LISTS = (nn.ModuleList, nn.Sequential)


def stacks(model: nn.Module, share: float = 0.1) -> list[list[Block]]:
    """Returns the stacks of a model: for each, names and modules of its blocks in order.

    The stages of a hierarchical model make one stack.  Lists with less than `share` of the parameters of the
    largest stack, such as small heads, are left out.  Stacks are in the order of registration.
    """
    candidates = _stacks(model, "")
    sizes = [sum(map(_size, (block for _, block in stack))) for stack in candidates]
    least = share * max(sizes, default=0)
    return [stack for stack, size in zip(candidates, sizes, strict=True) if size and size >= least]


def _stacks(module: nn.Module, name: str) -> list[list[Block]]:
    children = [(f"{name}.{key}".lstrip("."), child) for key, child in module.named_children()]
    if isinstance(module, _LISTS) and len({type(child) for _, child in children}) == 1:
        stages = [_stage(child, key) for key, child in children]
        if all(stages):
            return [[block for stage in stages for block in stage]]
        # A list of one counts as well, for models of one layer.
        if len(children) > 1 or (isinstance(module, nn.ModuleList) and list(children[0][1].children())):
            return [children]
    return [stack for key, child in children for stack in _stacks(child, key)]


def _stage(module: nn.Module, name: str) -> list[Block]:
    """Returns the blocks of a stage, none for other modules, such as a block with lists inside."""
    lists = {key: child for key, child in module.named_children() if isinstance(child, _LISTS) and len(child)}
    for key, child in lists.items():
        # Besides its blocks a stage may change the resolution, but has no attention and no norm.
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
