"""A training step on clean and adversarial inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attacks import fgsm
from .ball import Limit
from .objective import Losses, Objective, model_of


class Step(NamedTuple):
    """What a step has seen: losses as means over samples, 0-d, detached, still on the device."""

    loss: Tensor  # their sum, weighted
    clean: Tensor | None  # `None` where it has no weight
    adversarial: Tensor | None  # likewise
    inputs: Tensor  # the adversarial ones; x where they have no weight


def adversarial_training(
    model_or_loss: Objective, x: Tensor, y: Any, optimizer: torch.optim.Optimizer | None, epsilon: Limit, *,
    alpha: float = 0.5, attack: Callable[..., Tensor] = fgsm, scaler: Any = None, zero_grad: bool = True,
    model: nn.Module | None = None, **options: Any,
) -> Step:  # fmt: skip
    """One training step on alpha · loss(x) + (1 - alpha) · loss(x adversarial).

    ```python
    for x, y in loader:
        losses = adversarial_training(model, x, y, optimizer, epsilon=8 / 255, alpha=0.0, attack=pgd, steps=7)
    ```

    The attack sees the model in eval mode (or in `mode`), the training passes see it in training mode: every
    module in the one that it is in, or all if the model itself is in eval mode, to which it returns.  Each
    loss has a backward pass of its own, so that one graph is held at a time.  BatchNorm's statistics follow
    both passes.

    Args:
        model_or_loss: As in `fgsm`.
        x: Likewise.
        y: Likewise.
        optimizer: What steps; `None` leaves the gradients there, on top of those that were, for another call
            or for a step of your own.
        epsilon: As in `fgsm`.
        alpha: The weight of the clean loss, in [0, 1]; one that is 0 or 1 leaves out a pass.
        attack: `fgsm`, `ffgsm`, `pgd` or a function called in the same way; a step's length, which has the
            name of that weight, goes in by `functools.partial(pgd, alpha=2 / 255)`.
        scaler: A `torch.amp.GradScaler`: scales the losses, steps and updates.
        zero_grad: Whether to clear gradients before; they are not where there is no optimizer.
        model: As in `fgsm`.
        options: For the attack, such as `norm`, `bounds`, `steps`.

    Returns:
        The losses, and the adversarial inputs.

    Raises:
        ValueError: If alpha is out of range, and as in `fgsm`.

    Reference:
        Goodfellow et al. 2015 (alpha = 0.5); Madry et al. 2018 (alpha = 0, `attack=pgd`); Wong et al. 2020
        (alpha = 0, `attack=ffgsm`).
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha=}")
    whole = model_of(model_or_loss, model)
    adversarial = x
    if alpha < 1:
        adversarial = attack(model_or_loss, x, y, epsilon, model=model, **options)
    if optimizer is not None and zero_grad:
        optimizer.zero_grad()
    losses = Losses(model_or_loss, y)
    found: list[Tensor | None] = []
    with torch.enable_grad(), _training(whole):
        for inputs, weight in ((x, alpha), (adversarial, 1 - alpha)):
            if not weight:
                found.append(None)
                continue
            loss = losses(inputs).mean()
            weighted = weight * loss
            (weighted if scaler is None else scaler.scale(weighted)).backward()
            found.append(loss.detach())
    if optimizer is not None:
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    parts = [w * loss for w, loss in zip((alpha, 1 - alpha), found, strict=True) if loss is not None]
    return Step(torch.stack(parts).sum(), found[0], found[1], adversarial)


@contextlib.contextmanager
def _training(model: nn.Module | None) -> Iterator[None]:
    """Within the block a model that is in eval mode is in training mode."""
    modules = [] if model is None or model.training else list(model.modules())
    modes = [module.training for module in modules]
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.training = training
