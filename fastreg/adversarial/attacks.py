"""Attacks models along the gradient of the loss: FGSM, FGSM from a random start, and PGD."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from ..common.validation import check_flag, check_int, check_known
from ..ops._elementwise import draw_seed
from ..ops.adversarial import Bounds
from .ball import Ball, Limit, Range
from .objective import Losses, Objective, model_of, preserve_state, unwrap_ddp

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AttackOptions(TypedDict, total=False):
    """Keyword options of `pgd` and `ffgsm`."""

    mode: str
    model: nn.Module | None
    steepest: bool
    generator: torch.Generator | None


@torch._disable_dynamo  # `torch.compiler.disable` would import Dynamo, and triton with it
def fgsm(
    model_or_loss: Objective, x: Tensor, y: Any, epsilon: Limit, norm: str = "linf",
    bounds: Range = (0.0, 1.0), targeted: bool = False, *, mode: str = "eval",
    model: nn.Module | None = None, steepest: bool = False,
) -> Tensor:  # fmt: skip
    """Returns inputs after one step of length ε along the gradient: the fast gradient (sign) method.

    `"linf"`: x + ε sign(g). `"l2"`: x + ε g / max(‖g‖₂, 1e-12). `"l1"`: x + ε g / max(‖g‖₁, 1e-12) as in
    foolbox, or with `steepest` x + ε sign(gᵢ) for the one element i of the largest gradient, as in ART and
    CleverHans: the step of that L1 norm with the largest gain.  Norms are those of each sample.  NaN
    gradients count as 0, and for norms infinite ones too; a sample without a gradient does not move.

    The state of the model is preserved, also after an exception: gradients and `requires_grad` of parameters,
    the mode of every module, buffers, and the states of torch's random generators.

    Args:
        model_or_loss: A model that returns logits `[samples, classes, ...]` (or has them as `.logits`),
            attacked by the sum of the cross-entropies; or a function of (x, y) that returns a loss, a scalar
            or `[samples]`.
        x: `[samples, ...]`, of a floating dtype.
        y: The labels of the loss; for a model classes or probabilities.
        epsilon: ε ≥ 0 in units of x, a number or `[samples]`.
        norm: `"linf"`, `"l2"` or `"l1"`.
        bounds: The range `(lower, upper)` that results are clamped to, as the dtype of x represents it:
            numbers, `[channels]` along dimension 1, or tensors that broadcast with a sample; `None` for no
            bounds.
        targeted: Whether to lower the loss, with y as the wanted output.
        mode: The mode of the model during the attack: `"eval"`, `"train"`, or `"keep"` for its present one.
        model: The model, if the first argument is a function: its mode is set, its buffers are preserved.
            Without it, `mode` has no effect, and buffers that the function changes stay changed.
        steepest: Whether `"l1"` moves a single element, see above.

    Returns:
        Adversarial inputs, of the shape, dtype and strides of x, without a gradient.  In float32 they are
        within ε up to rounding.  16-bit ones are rounded towards x: they are within ε exactly, and steps
        smaller than a unit in the last place of x are lost.

    Raises:
        TypeError: If x is not of a floating dtype, or the model returns no logits.
        ValueError: For values out of range, inputs out of bounds, and a loss that does not depend on x.

    Reference:
        Goodfellow, Shlens, Szegedy 2015, "Explaining and harnessing adversarial examples".
    """
    check_flag("targeted", targeted)
    ball, losses = Ball(x, epsilon, norm, bounds, steepest), Losses(unwrap_ddp(model_or_loss), y)
    if not x.numel():
        return x.detach().clone()
    with preserve_state(model_of(model_or_loss, model), mode, x.device):
        gradient = losses.gradient(ball.layout.unflatten(ball.clean))[1]
        return ball.layout.unflatten(ball.step(None, gradient, ball.epsilon, not targeted)[0])


def fgsm_attack(image: Tensor, epsilon: float, data_grad: Tensor) -> Tensor:
    """Returns clamp(image + ε sign(data_grad), 0, 1) in one pass, as the function of PyTorch's tutorial.

    Args:
        image: Any shape, of a floating dtype, in [0, 1].
        epsilon: ε ≥ 0.
        data_grad: The gradient of the loss, of the shape of the image.

    Returns:
        Of the shape and dtype of the image; the tutorial's results bit for bit in float32 and float64.

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
        out.copy_(ball.layout.unflatten(ball.step(None, gradient, ball.epsilon)[0]).view_as(out))
    return out


@_fgsm_attack.register_fake
def _(image: Tensor, epsilon: float, data_grad: Tensor) -> Tensor:
    return torch.empty_like(image)


def ffgsm(
    model_or_loss: Objective, x: Tensor, y: Any, epsilon: Limit, alpha: Limit | None = None,
    bounds: Range = (0.0, 1.0), targeted: bool = False, **options: Unpack[AttackOptions],
) -> Tensor:  # fmt: skip
    """Returns inputs after one step of FGSM from a random start in the ball, for fast adversarial training.

    This is one step of `pgd` for `"linf"`, of length alpha, by default 1.25 epsilon.  All other arguments,
    result and errors are those of `fgsm`; options are `mode`, `model`, and `generator` as in `pgd`.

    Reference:
        Wong, Rice, Kolter 2020, "Fast is better than free: revisiting adversarial training".
    """
    alpha = 1.25 * epsilon if alpha is None else alpha
    return pgd(model_or_loss, x, y, epsilon, alpha, 1, bounds=bounds, targeted=targeted, **options)


@torch._disable_dynamo  # `torch.compiler.disable` would import Dynamo, and triton with it
def pgd(
    model_or_loss: Objective, x: Tensor, y: Any, epsilon: Limit, alpha: Limit | None = None, steps: int = 10,
    norm: str = "linf", bounds: Range = (0.0, 1.0), targeted: bool = False, random_start: bool = True, *,
    restarts: int = 1, keep_best: bool = False, **options: Unpack[AttackOptions],
) -> Tensor:  # fmt: skip
    """Returns inputs after projected gradient descent: steps along the gradient, each projected on the ball.

    Results are then clamped to the bounds.  Steps are those of `fgsm`.  16-bit inputs move in float32, and
    the model gets them rounded towards x, so that small steps are not lost.

    A random start draws one number from torch's generator for the device of x, or from `generator`:
    `torch.manual_seed` makes it reproducible, and repeated calls differ.  Random numbers drawn during the
    attack, such as by dropout, do not change the states of torch's generators.

    Arguments are those of `fgsm`, and:
        alpha: The length of a step, a number or `[samples]`; by default 2.5 epsilon / steps.
        steps: Number of steps, ≥ 1.
        random_start: Whether to start from a point drawn uniformly from the ball.
        restarts: Number of starts, ≥ 1. Each sample keeps the result with the largest loss (`targeted`: the
            smallest).
        keep_best: Whether to keep the best of all points on the way, too.
        generator: The generator of the random start, by default torch's own.

    Returns:
        Adversarial inputs, see `fgsm`.

    Raises:
        TypeError: As in `fgsm`, and for unknown options.
        ValueError: As in `fgsm`; and for `restarts` or `keep_best` with a loss that is one scalar.

    Reference:
        Madry, Makelov, Schmidt, Tsipras, Vladu 2018, "Towards deep learning models resistant to adversarial
        attacks".
    """
    for name in sorted(options.keys() - AttackOptions.__annotations__.keys()):
        known = [*list(inspect.signature(pgd).parameters)[3:-1], *AttackOptions.__annotations__]
        check_known("pgd() got unknown option", [name], known, TypeError)
    generator, model = options.get("generator"), model_of(model_or_loss, options.get("model"))
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    steps, restarts = check_int("steps", steps), check_int("restarts", restarts)
    for name, flag in (("targeted", targeted), ("random_start", random_start), ("keep_best", keep_best)):
        check_flag(name, flag)
    if restarts > 1 and not random_start:
        raise ValueError(f"restarts need a random start to differ, got {restarts=} and {random_start=}")
    ball = Ball(x, epsilon, norm, bounds, options.get("steepest", False))
    losses = Losses(unwrap_ddp(model_or_loss), y)
    size = ball.epsilon * (2.5 / steps) if alpha is None else ball.per_sample("alpha", alpha)
    if not x.numel():
        return x.detach().clone()
    seed = draw_seed(x.device, generator) if random_start else None
    best = _Best(losses, ball, targeted) if keep_best or restarts > 1 else None
    with preserve_state(model, options.get("mode", "eval"), x.device):
        for attempt in range(restarts):
            seen = point = ball.clean
            if seed is not None:
                seen, point = ball.start(seed, attempt)
            for _ in range(steps):
                values, gradient = losses.gradient(ball.layout.unflatten(seen))
                if best is not None and keep_best:
                    best.offer(seen, values)
                seen, point = ball.step(point, gradient, size, not targeted)
            if best is not None:
                best.offer(seen)
        return ball.layout.unflatten(seen if best is None else best.points)


class _Best:
    """The best points so far and their losses."""

    def __init__(self, losses: Losses, ball: Ball, targeted: bool) -> None:
        self._losses, self._layout, self._sign = losses, ball.layout, -1 if targeted else 1
        self.points = ball.clean
        self._gains = torch.full((len(ball.clean),), torch.nan, device=ball.clean.device)

    @torch.no_grad()
    def offer(self, points: Tensor, losses: Tensor | None = None) -> None:
        """Keeps the points, `[samples, elements]`, whose losses are better than the best so far.

        Raises:
            ValueError: If the loss is a scalar.
        """
        if losses is None:
            losses = self._losses(self._layout.unflatten(points))
        if losses.shape != points.shape[:1]:
            raise ValueError(
                f"restarts and keep_best need a loss for each sample, [{len(points)}], got a scalar; compute "
                "it with reduction='none'"
            )
        gains = self._sign * losses.float()
        better = (gains > self._gains) | self._gains.isnan()  # NaN before the first offer
        self.points = torch.where(better[:, None], points, self.points)
        self._gains = torch.where(better, gains, self._gains)
