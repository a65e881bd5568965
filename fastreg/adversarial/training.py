"""Takes training steps on clean and adversarial inputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.module_state import preserve_modes
from ..common.validation import check_range
from .attacks import fgsm
from .ball import Limit
from .objective import Losses, Objective, model_of


class Step(NamedTuple):
    """The losses of a step as means over samples, 0-d, detached, on the device; and its inputs."""

    loss: Tensor  # the weighted sum
    clean: Tensor | None  # `None` if its weight is 0
    adversarial: Tensor | None  # `None` if its weight is 0
    inputs: Tensor  # the adversarial inputs; x if their weight is 0


def adversarial_training(
    model_or_loss: Objective, x: Tensor, y: Any, optimizer: torch.optim.Optimizer | None, epsilon: Limit, *,
    alpha: float = 0.5, attack: Callable[..., Tensor] = fgsm, scaler: Any = None, zero_grad: bool = True,
    model: nn.Module | None = None, **options: Any,
) -> Step:  # fmt: skip
    """Takes one training step on alpha · loss(x) + (1 - alpha) · loss(x adversarial).

    ```python
    for x, y in loader:
        losses = adversarial_training(model, x, y, optimizer, epsilon=8 / 255, alpha=0.0, attack=pgd, steps=7)
    ```

    The attack runs the model in eval mode (or in `mode`).  The training passes run it as it is if the model
    is in training mode; a model in eval mode is in training mode for them, with all of its modules.  Each
    loss has its own backward pass, so that one graph is held at a time.  BatchNorm's statistics follow both
    passes.

    Arguments are those of `fgsm`, and:
        optimizer: Takes the step; with `None` the gradients are added to `p.grad`, for another call or a step
            of your own.
        alpha: The weight of the clean loss, in [0, 1]; 0 and 1 leave out one pass.
        attack: `fgsm`, `ffgsm`, `pgd` or a function with the same arguments; set the attack's own `alpha` by
            `functools.partial(pgd, alpha=2 / 255)`.
        scaler: A `torch.amp.GradScaler`: scales the losses, steps and updates.
        zero_grad: Whether to clear gradients before the step; ignored without an optimizer.
        options: Further options of the attack, such as `steps`.

    Returns:
        The losses, and the adversarial inputs.

    Raises:
        ValueError: If alpha is out of range, and as in `fgsm`.

    Reference:
        Goodfellow et al. 2015 (alpha = 0.5); Madry et al. 2018 (alpha = 0, `attack=pgd`); Wong et al. 2020
        (alpha = 0, `attack=ffgsm`).
    """
    check_range("alpha", alpha, 0, 1)
    trained = model_of(model_or_loss, model)
    adversarial = x
    if alpha < 1:
        adversarial = attack(model_or_loss, x, y, epsilon, model=model, **options)
    if optimizer is not None and zero_grad:
        optimizer.zero_grad()
    losses = Losses(model_or_loss, y)
    means: list[Tensor | None] = []
    in_eval = trained is not None and not trained.training
    with torch.enable_grad(), preserve_modes(trained if in_eval else None, True):
        for inputs, weight in ((x, alpha), (adversarial, 1 - alpha)):
            if not weight:
                means.append(None)
                continue
            loss = losses(inputs).mean()
            weighted = weight * loss
            (weighted if scaler is None else scaler.scale(weighted)).backward()
            means.append(loss.detach())
    if optimizer is not None:
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    parts = [w * loss for w, loss in zip((alpha, 1 - alpha), means, strict=True) if loss is not None]
    return Step(torch.stack(parts).sum(), means[0], means[1], adversarial)
