"""Estimates the running statistics of batch normalization again, or freezes them for a second pass."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from .batches import move_to_device
from .module_state import preserve_modes

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

ForwardFn = Callable[[nn.Module, Any], Any]


@torch.no_grad()
def update_bn(
    loader: Iterable[Any], model: nn.Module, device: int | str | torch.device | None = None,
    forward_fn: ForwardFn | None = None,
) -> None:  # fmt: skip
    """Estimates the running statistics of every BatchNorm again, which averaged weights need.

    The running mean becomes the mean of the batches' means, the running variance that of their unbiased
    variances, as with `torch.optim.swa_utils.update_bn`.  More kinds of batches are accepted, and every
    module keeps its mode.

    Args:
        loader: Batches, all of the same size.  The model gets a mapping as keyword arguments, a tensor as the
            only argument, and of a list or tuple the first element in the same way.
        model: The model, such as an `AveragedModel`.
        device: Where to move the tensors of a batch.
        forward_fn: Runs the model on batches of other kinds: `forward_fn(model, batch)`.

    Raises:
        TypeError: For other batches without `forward_fn`; statistics are then those of the batches before.
        ValueError: If there is no batch; statistics are then unchanged.

    Reference:
        Izmailov et al. 2018, "Averaging weights leads to wider optima and better generalization".
    """
    if forward_fn is not None and not callable(forward_fn):
        raise TypeError(f"forward_fn must be callable as forward_fn(model, batch), got {forward_fn!r}")
    momenta = {module: module.momentum for module in model.modules() if isinstance(module, _BatchNorm)}
    if not momenta:
        return
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        raise ValueError(
            f"loader must yield a batch, got none from {loader!r}; is it an iterator that is used up?"
        )
    # A sharded model holds its averages only within this block.
    swapped_in = getattr(model, "swapped_in", contextlib.nullcontext)
    try:
        with preserve_modes(model), swapped_in():
            model.train()
            for norm in momenta:
                norm.reset_running_stats()
                norm.momentum = None  # for the mean over all batches
            for batch in itertools.chain([first], batches):
                if forward_fn is None:
                    _forward(model, batch, device)
                else:
                    forward_fn(model, move_to_device(batch, device))
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum


def _forward(model: nn.Module, batch: Any, device: Any) -> None:
    inputs = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if not isinstance(inputs, (Tensor, Mapping)):
        raise TypeError(
            "batches must be tensors, mappings, or lists and tuples that start with one, "
            f"got {batch!r}; pass forward_fn=lambda model, batch: ..."
        )
    inputs = move_to_device(inputs, device)
    model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


@contextlib.contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """Leaves the running statistics of normalization layers in training mode unchanged in the block.

    For a second forward pass on the same batch, such as SAM's at the perturbed weights: outputs and gradients
    are those of training mode, but running mean, running variance and the number of batches stay as they are.
    The block may end before `backward()`, and may be nested.

    Args:
        model: A model with BatchNorm, SyncBatchNorm or InstanceNorm layers; those in eval mode are left
            alone. In the block the layers have no running statistics: save no checkpoint within.
    """
    statistics = [
        (norm, name, norm._buffers[name])
        for norm in model.modules()
        if isinstance(norm, _NormBase) and norm.training
        for name in STATISTICS
        if name in norm._buffers
    ]
    try:
        # Removed, not copied back: an in-place copy would spoil tensors that autograd may have saved.
        for norm, name, _ in statistics:
            norm._buffers[name] = None
        yield
    finally:
        for norm, name, statistic in statistics:
            norm._buffers[name] = statistic
