"""Saves and restores the state of modules and of torch's random generators around a block."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

_WITHOUT_GENERATOR = ("cpu", "meta", "mps")


@contextlib.contextmanager
def preserve_modes(model: nn.Module | None, training: bool | None = None) -> Iterator[None]:
    """Restores the training mode of every module after the block; a model of `None` has none.

    In the block all have the mode `training`; `None` leaves them as they are.
    """
    modules = [] if model is None else list(model.modules())
    modes = [module.training for module in modules]
    try:
        if training is not None:
            for module in modules:
                module.training = training
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


@contextlib.contextmanager
def preserve_rng(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Restores torch's random generators, of the CPU and of some devices, after the block."""
    others = [device for device in devices if device.type not in _WITHOUT_GENERATOR]
    kind = others[0].type if others else "cuda"
    with torch.random.fork_rng(sorted({device.index or 0 for device in others}), device_type=kind):
        yield


@contextlib.contextmanager
def preserve_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Gives modules, without those inside them, copies of their buffers for the block.

    The buffers themselves may be part of a graph.
    """
    originals = [(module, dict(module._buffers)) for module in modules]
    copies: dict[int, torch.Tensor | None] = {id(None): None}
    try:
        for module, buffers in originals:
            for name, buffer in buffers.items():
                if id(buffer) not in copies and buffer is not None:
                    copies[id(buffer)] = buffer.detach().clone()
                module._buffers[name] = copies[id(buffer)]
        yield
    finally:
        for module, buffers in originals:
            module._buffers.update(buffers)


def devices_of(model: nn.Module | None) -> set[torch.device]:
    """Returns the devices of the parameters and buffers of a model."""
    return set() if model is None else {t.device for t in (*model.parameters(), *model.buffers())}
