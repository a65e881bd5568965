"""Attacks by the gradient: the fast gradient sign method and what became of it."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.adversarial import Bounds
from .ball import Ball, Limit, Range, draw_seed
from .objective import Losses, Objective, bare, model_of, undisturbed


@torch._disable_dynamo  # `torch.compiler.disable` would import Dynamo, and triton with it
def fgsm(
    model_or_loss: Objective, x: Tensor, y: Any, epsilon: Limit, norm: str = "linf",
    bounds: Range = (0.0, 1.0), targeted: bool = False, *, mode: str = "eval",
    model: nn.Module | None = None, steepest: bool = False,
) -> Tensor:  # fmt: skip
    """The fast gradient (sign) method: one step of length epsilon along the gradient of the loss.

    `"linf"`: x + ε sign(g). `"l2"`: x + ε g / max(‖g‖₂, 1e-12). `"l1"`: x + ε g / max(‖g‖₁, 1e-12) as in
    foolbox, or with `steepest` x + ε sign(gᵢ) for the one element i of the largest gradient, as in ART and
    CleverHans: of all steps with that L1 norm the one that gains most.  Norms are those of each sample.  NaN
    gradients count as 0, where a norm is taken infinite ones too; a sample without a gradient stays where it
    is.

    Nothing else changes: gradients and `requires_grad` of parameters, the mode of every module, buffers and
    the states of torch's random generators are what they were, also after an exception.

    Args:
        model_or_loss: A model that returns logits `[samples, classes, ...]` (or has them as `.logits`),
            attacked by the sum of the cross-entropies; or a function of (x, y) that returns a loss, a scalar
            or `[samples]`.
        x: `[samples, ...]`, of a floating dtype.
        y: What the loss takes; for a model classes or probabilities.
        epsilon: ε ≥ 0 in units of x, a number or `[samples]`.
        norm: `"linf"`, `"l2"` or `"l1"`.
        bounds: What elements are then clamped between, `(lower, upper)`, as the dtype of x holds them:
            numbers, `[channels]` along dimension 1, or tensors that broadcast with a sample; `None` for
            nothing.
        targeted: Whether to lower the loss, with y as what the model shall say.
        mode: What the model is in meanwhile: `"eval"`, `"train"`, or `"keep"` for what it is in.
        model: The model, where the first argument is a function: whose mode to set and whose buffers to keep;
            without it, `mode` does nothing, and buffers that the function changes stay changed.
        steepest: See above.

    Returns:
        Adversarial inputs, of the shape, dtype and strides of x, without a gradient.  In float32 they are
        within ε up to rounding; 16-bit ones are rounded towards x, so that they are within ε exactly and what
        is smaller than a unit in the last place of x is lost.

    Raises:
        TypeError: If x is not of a floating dtype, or the model returns no logits.
        ValueError: For values out of range, inputs out of bounds, and a loss that does not depend on x.

    Reference:
        Goodfellow, Shlens, Szegedy 2015, "Explaining and harnessing adversarial examples".
    """
    ball, losses = Ball(x, epsilon, norm, bounds, steepest), Losses(bare(model_or_loss), y)
    if not x.numel():
        return x.detach().clone()
    with undisturbed(model_of(model_or_loss, model), mode, x.device):
        gradient = losses.gradient(ball.layout.whole(ball.clean))[1]
        return ball.layout.whole(ball.step(None, gradient, ball.epsilon, not targeted)[0])


def fgsm_attack(image: Tensor, epsilon: float, data_grad: Tensor) -> Tensor:
    """The function of that name in PyTorch's tutorial: clamp(image + ε sign(data_grad), 0, 1), in one pass.

    Args:
        image: Any shape, of a floating dtype, in [0, 1].
        epsilon: ε ≥ 0.
        data_grad: The gradient of the loss, of the shape of the image.

    Returns:
        Of the shape and dtype of the image; as the tutorial's bit for bit in float32 and float64.

    Raises:
        TypeError: If the image is not of a floating dtype.
        ValueError: If epsilon is out of range, or shapes differ.
    """
    if data_grad is None or data_grad.shape != image.shape:
        shape = None if data_grad is None else tuple(data_grad.shape)
        raise ValueError(
            f"data_grad must have the shape of the image, {tuple(image.shape)}, got {shape}; call "
            "image.requires_grad_() before the loss and loss.backward(), and pass image.grad"
        )
    return _fgsm_attack(image.detach(), epsilon, data_grad.detach())


@torch.library.custom_op("fastreg::fgsm_attack", mutates_args=())
def _fgsm_attack(image: Tensor, epsilon: float, data_grad: Tensor) -> Tensor:
    out = torch.empty_like(image)
    if image.numel():
        source, gradient = (t if t.dim() else t[None] for t in (image, data_grad))
        ball = Ball(source, epsilon, "linf", None)
        scalar = image.new_zeros(())
        ball.bounds = Bounds(scalar, torch.ones_like(scalar), 1)
        out.copy_(ball.layout.whole(ball.step(None, gradient, ball.epsilon)[0]).view_as(out))
    return out


@_fgsm_attack.register_fake
def _(image: Tensor, epsilon: float, data_grad: Tensor) -> Tensor:
    return torch.empty_like(image)


def ffgsm(
    model_or_loss: Objective, x: Tensor, y: Any, epsilon: Limit, alpha: Limit | None = None,
    bounds: Range = (0.0, 1.0), targeted: bool = False, *, mode: str = "eval",
    model: nn.Module | None = None, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """FGSM from a random start in the ball: what makes adversarial training with one step work.

    Args:
        model_or_loss: As in `fgsm`.
        x: Likewise.
        y: Likewise.
        epsilon: Likewise.
        alpha: The length of the step; by default 1.25 epsilon.
        bounds: As in `fgsm`.
        targeted: Likewise.
        mode: Likewise.
        model: Likewise.
        generator: As in `pgd`.

    Returns:
        As in `fgsm`.

    Raises:
        TypeError: As in `fgsm`.
        ValueError: Likewise.

    Reference:
        Wong, Rice, Kolter 2020, "Fast is better than free: revisiting adversarial training".
    """
    return pgd(
        model_or_loss, x, y, epsilon, 1.25 * epsilon if alpha is None else alpha, 1, bounds=bounds,
        targeted=targeted, random_start=True, mode=mode, model=model, generator=generator,
    )  # fmt: skip


@torch._disable_dynamo  # `torch.compiler.disable` would import Dynamo, and triton with it
def pgd(
    model_or_loss: Objective, x: Tensor, y: Any, epsilon: Limit, alpha: Limit | None = None, steps: int = 10,
    norm: str = "linf", bounds: Range = (0.0, 1.0), targeted: bool = False, random_start: bool = True, *,
    restarts: int = 1, keep_best: bool = False, mode: str = "eval", model: nn.Module | None = None,
    steepest: bool = False, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Projected gradient descent: steps along the gradient, each followed by the way back into the ball.

    The ball is then clamped to the bounds.  Steps are those of `fgsm`; 16-bit inputs move in float32 and the
    model sees them rounded towards x, so that small steps are not lost.

    A random start takes one number from torch's generator for the device of x, or from `generator`:
    `torch.manual_seed` rules it, and calls differ.  Beyond that one, nothing that an attack draws (a model's
    dropout, say) changes the generators' states.

    Args:
        model_or_loss: As in `fgsm`.
        x: Likewise.
        y: Likewise.
        epsilon: Likewise.
        alpha: The length of a step, a number or `[samples]`; by default 2.5 epsilon / steps.
        steps: How many; ≥ 1.
        norm: As in `fgsm`.
        bounds: Likewise.
        targeted: Likewise.
        random_start: Whether to start from a point that is drawn uniformly from the ball.
        restarts: How often to start; ≥ 1. Of their results each sample keeps the one with the largest loss
            (`targeted`: the smallest).
        keep_best: Whether that is also true of all points on the way.
        mode: As in `fgsm`.
        model: Likewise.
        steepest: Likewise.
        generator: What a random start is drawn from instead of torch's own generator.

    Returns:
        As in `fgsm`.

    Raises:
        TypeError: As in `fgsm`.
        ValueError: Likewise; and if a best is to be kept of a loss that is one scalar.

    Reference:
        Madry, Makelov, Schmidt, Tsipras, Vladu 2018, "Towards deep learning models resistant to adversarial
        attacks".
    """
    for name, count in (("steps", steps), ("restarts", restarts)):
        if not isinstance(count, numbers.Integral) or count < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {name}={count!r}")
    if restarts > 1 and not random_start:
        raise ValueError(f"restarts need a random start to differ, got {restarts=} and {random_start=}")
    ball, losses = Ball(x, epsilon, norm, bounds, steepest), Losses(bare(model_or_loss), y)
    size = ball.epsilon * (2.5 / steps) if alpha is None else ball.sizes("alpha", alpha)
    if not x.numel():
        return x.detach().clone()
    seed = draw_seed(x.device, generator) if random_start else None
    best = _Best(losses, ball, targeted) if keep_best or restarts > 1 else None
    with undisturbed(model_of(model_or_loss, model), mode, x.device):
        for attempt in range(restarts):
            seen = point = ball.clean
            if seed is not None:
                seen, point = ball.start(seed, attempt)
            for _ in range(steps):
                found, gradient = losses.gradient(ball.layout.whole(seen))
                if best is not None and keep_best:
                    best.offer(seen, found)
                seen, point = ball.step(point, gradient, size, not targeted)
            if best is not None:
                best.offer(seen)
        return ball.layout.whole(seen if best is None else best.points)


class _Best:
    """The best points so far, and their losses."""

    def __init__(self, losses: Losses, ball: Ball, targeted: bool) -> None:
        self._losses, self._layout, self._sign = losses, ball.layout, -1 if targeted else 1
        self.points = ball.clean
        self._gains: Tensor | None = None

    @torch.no_grad()
    def offer(self, points: Tensor, losses: Tensor | None = None) -> None:
        """Take what is better: `[samples, elements]`, with their losses if those are known.

        Raises:
            ValueError: If the loss is one for all.
        """
        if losses is None:
            losses = self._losses(self._layout.whole(points))
        if losses.shape != points.shape[:1]:
            raise ValueError(
                f"restarts and keep_best need a loss for each sample, [{len(points)}], got a scalar; compute "
                "it with reduction='none'"
            )
        gains = self._sign * losses.float()
        if self._gains is None:
            self.points, self._gains = points, gains
        else:
            better = (gains > self._gains) | self._gains.isnan()
            self.points = torch.where(better[:, None], points, self.points)
            self._gains = torch.where(better, gains, self._gains)
