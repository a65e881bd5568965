"""Speaks the protocols by which a `torch.amp.GradScaler` and a step agree on unscaling.

A scaler hands `optimizer.grad_scale` and `optimizer.found_inf` to optimizers that divide by the scale
themselves, but looks for infinities first, in a pass that reads and writes every gradient.  By its older
protocol it passes itself to optimizers whose `step` takes `grad_scaler`, and leaves that to them as well: the
norm that clipping needs finds infinities in one read.
"""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState


class Scaling(NamedTuple):
    """The scale of the gradients of a step, and whether they have been checked."""

    scale: Tensor | None = None  # factor by which gradients have been multiplied
    found_inf: Tensor | None = None  # not 0: something is not finite, skip the step
    record: dict[torch.device, Tensor] | None = None  # where the scaler looks for flags of infinities

    @property
    def active(self) -> bool:
        """Whether there is a scaler, which skips steps as a matter of course."""
        return self.found_inf is not None or self.record is not None


UNSCALED = Scaling()
"""The scaling of gradients without a scaler."""


def scaling(optimizer: torch.optim.Optimizer, scaler: GradScaler | Scaling | None) -> Scaling:
    """Returns the scaling of this step; a wrapper, which the scaler knows, passes on its own `Scaling`.

    Raises:
        RuntimeError: If the scaler steps another optimizer than this.
    """
    if isinstance(scaler, Scaling):
        return scaler
    scale = getattr(optimizer, "grad_scale", None)
    if scaler is None:
        return Scaling(scale, getattr(optimizer, "found_inf", None))
    if id(optimizer) not in scaler._per_optimizer_states:
        raise RuntimeError(
            f"step(grad_scaler=...) is for torch.amp.GradScaler.step(optimizer), "
            f"which has not been called with this {type(optimizer).__name__}"
        )
    state = scaler._per_optimizer_states[id(optimizer)]
    # A subclass that overrides unscale_ (e.g. to reduce over ranks) unscales itself.
    if state["stage"] is OptState.READY and type(scaler).unscale_ is not GradScaler.unscale_:
        scaler.unscale_(optimizer)
    if state["stage"] is OptState.UNSCALED:
        flags = list(state["found_inf_per_device"].values())
        return Scaling(scale, torch.stack([flag.to(flags[0].device) for flag in flags]).amax())
    current = scaler._get_scale_async()
    return Scaling(current if scale is None else current * scale, None, state["found_inf_per_device"])


def silence() -> None:
    """Silences the warning of the scaler, at every step, that it is going to drop its older protocol."""
    warnings.filterwarnings(
        "ignore", message="GradScaler is going to stop passing itself", category=FutureWarning
    )


def supports_scaling(groups: list[dict[str, Any]], clips: bool) -> bool:
    """Returns whether a scaler leaves unscaling to the step: if that saves a pass or was asked for.

    Lightning refuses its own clipping for optimizers that unscale themselves.
    """
    return clips or any(group.get("fused") for group in groups)


def unscale(optimizer: torch.optim.Optimizer, scaler: GradScaler | None, bad: Tensor | None) -> bool:
    """Unscales the gradients of an optimizer around one that does not, and returns whether to skip its step.

    Args:
        optimizer: The outer optimizer, which the scaler steps.
        scaler: The scaler; `None` where `step` is hidden from it, as by accelerate.
        bad: Not 0: earlier gradients of the step were not finite.
    """
    if scaler is None:
        hidden = scaling(optimizer, None)
        if hidden.scale is not None:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.div_(hidden.scale.to(p.grad))
        flags = [] if hidden.found_inf is None else [hidden.found_inf, *([] if bad is None else [bad])]
        return any(bool(flag.item()) for flag in flags)
    state = scaler._per_optimizer_states[id(optimizer)]
    if state["stage"] is OptState.READY:
        scaler.unscale_(optimizer)
    by_device = state["found_inf_per_device"]
    if bad is not None:
        earlier = by_device.get(bad.device)
        by_device[bad.device] = bad.float() if earlier is None else torch.maximum(earlier, bad.to(earlier))
    return any(bool(flag.item()) for flag in by_device.values())
