"""Moves adversarial inputs: a step along the gradient, back into the ball, within the bounds.

Tensors are `[samples, elements]`; numbers of each sample are `[samples, 1]`.
"""

import torch
from torch import Tensor

from .norm import SHORT
from .random import PhiloxPosition, laplace, normal, uniform
from .step import compute_dtype, scalar_dtype

NOISES = ("uniform", "normal", "laplace")


def direction(
    gradient: Tensor | None, seed: Tensor | int, peaks: Tensor | None, kind: str, like: Tensor
) -> Tensor:
    """Returns the direction of a step, in the precision and of the shape of `like`.

    sign     the sign of the gradient: the steepest ascent for a step of a given largest element
    scaled   the gradient itself, elements that are not finite as 0: the steepest for a given Euclidean norm
    peak     the sign of the one element whose index is in `peaks`: the steepest for a given L1 norm
    uniform  noise in [-1, 1)
    normal   standard normal noise
    laplace  Laplace noise

    NaN has no sign.
    """
    if kind in NOISES:
        flat, at = like.reshape(-1), PhiloxPosition(0, 0, 0, 0)
        if kind == "uniform":
            draws = 2 * uniform(seed, at, flat) - 1
        else:
            draws = (normal if kind == "normal" else laplace)(seed, at, flat)
        return draws.to(like.dtype).reshape(like.shape)
    assert gradient is not None
    g = gradient.to(like.dtype)
    if kind == "scaled":
        return torch.where(g.abs() < torch.inf, g, 0)
    sign = (g > 0).to(g.dtype) - (g < 0).to(g.dtype)
    if kind == "sign":
        return sign
    assert peaks is not None
    index = torch.arange(g.shape[1], device=g.device)
    return torch.where(index == peaks[:, None], sign, 0)


def project(y: Tensor, clean: Tensor, radius: Tensor, keep: Tensor, ball: str) -> Tensor:
    """Returns the point of the ball around the clean input that is nearest to y.

    The ball is `"none"`, `"linf"`, `"l2"` or `"l1"`.  Only `"linf"` uses the radius.  For `"l2"`, `keep` is
    min(radius / ‖y - clean‖, 1), for `"l1"` the `threshold`.
    """
    if ball == "linf":
        return torch.minimum(torch.maximum(y, clean - radius), clean + radius)
    if ball == "l2":
        return torch.where(keep < 1, clean + keep * (y - clean), y)
    if ball == "l1":
        away = y - clean
        return torch.where(keep > 0, clean + away.sign() * (away.abs() - keep).clamp(min=0), y)
    return y


def threshold(size: Tensor, radius: Tensor) -> Tensor:
    """Returns the threshold of the projection on the L1 ball, `[samples, 1]`; 0 for points inside.

    The projection subtracts it from the size of each element, |y - clean|.

    Reference:
        Duchi, Shalev-Shwartz, Singer, Chandra 2008, "Efficient projections onto the ℓ1-ball".
    """
    ordered = size.to(scalar_dtype(size.device)).sort(dim=1, descending=True).values
    total = ordered.cumsum(1)
    count = torch.arange(1, size.shape[1] + 1, device=size.device)
    above = (total - radius) / count
    last = (ordered > above).sum(1, keepdim=True).clamp(min=1)
    subtracted = above.gather(1, last - 1)
    return torch.where(total[:, -1:] > radius, subtracted, 0).to(size.dtype)


def towards(y: Tensor, clean: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns y rounded to 16 bits towards the clean input, so that no norm of y - clean grows.

    It works on the bits of a float32, since Inductor omits a conversion that is undone.  Times 2⁻¹¹² these
    are the bits of the float16 followed by 13 more.
    """
    scale, unit = (2.0**112, 0x2000) if dtype == torch.float16 else (1.0, 0x10000)
    size = y.abs()
    bits = (size * (1 / scale)).view(torch.int32) & -unit
    cut = bits.view(torch.float32) * scale
    outward = torch.where(y < 0, clean < y, clean > y)
    # Truncation rounds to 0, except for subnormal float32 numbers, which may have been rounded up.
    moved = torch.where(outward, (cut < size).int(), -(cut > size).int())
    rounded = (bits + unit * moved).view(torch.float32) * scale
    largest = torch.where(outward | (size == torch.inf), torch.inf, torch.finfo(dtype).max)
    return torch.where(y == y, torch.minimum(rounded, largest).copysign(y), y).to(dtype)


def step(
    x: Tensor, gradient: Tensor | None, clean: Tensor | None, step_scalars: Tensor, peaks: Tensor | None,
    lower: Tensor | None, upper: Tensor | None, seed: Tensor | int, kind: str, ball: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns x + size · direction, projected on the ball around the clean input and clamped to the bounds.

    Args:
        x: `[samples, elements]`, the present points.
        gradient: Of the same shape, for directions that need one.
        clean: Of the same shape, the centres of the balls; x by default.
        step_scalars: `[samples or 1, 3]`: radius, step size, and `keep` of `project`.
        peaks: int64 `[samples]`, for the direction `"peak"`.
        lower: 0-d or `[elements]`, if there are bounds.
        upper: Of the same shape, if there are bounds.
        seed: 64 bits, for noise.
        kind: See `direction`; `"none"` for no step.
        ball: See `project`.
        dtype: Of the result; 16-bit results are rounded towards the clean input.

    Returns:
        The result, and the same without rounding.
    """
    compute = compute_dtype(dtype)
    y = x.to(compute)
    centre = y if clean is None else clean.to(compute)
    radius, size, keep = step_scalars.split(1, dim=1)
    if kind != "none":
        y = y + size * direction(gradient, seed, peaks, kind, y)
    y = project(y, centre, radius, keep, ball)
    narrow = towards(y, centre, dtype).to(compute) if dtype.itemsize == 2 else None
    if lower is not None and upper is not None:
        low, high = lower.to(compute), upper.to(compute)
        y = torch.minimum(torch.maximum(y, low), high)
        if narrow is not None:
            narrow = torch.minimum(torch.maximum(narrow, low), high)
    return y if narrow is None else narrow.to(dtype), y


def size(
    x: Tensor, gradient: Tensor | None, clean: Tensor | None, step_scalars: Tensor | None,
    seed: Tensor | int, kind: str, order: int,
) -> Tensor:  # fmt: skip
    """Returns the L1 or L2 norm of the direction of each sample, `[samples, 1]`.

    With clean, it is the norm of the perturbation x + size · direction - clean.  Long samples are summed in
    float64, and all samples where the conversion is free: see `norm.SHORT`.
    """
    compute = compute_dtype(x.dtype)
    w = direction(gradient, seed, None, kind, x.to(compute))
    if clean is not None:
        assert step_scalars is not None
        w = x.to(compute) + step_scalars[:, 1:2] * w - clean.to(compute)
    if torch.compiler.is_compiling():  # Inductor's code for norms is ten times slower
        w = w.to(scalar_dtype(w.device))
        norm = w.square().sum(1, keepdim=True).sqrt() if order == 2 else w.abs().sum(1, keepdim=True)
    else:
        wide = scalar_dtype(w.device) if w.shape[1] > SHORT else None
        norm = torch.linalg.vector_norm(w, order, dim=1, keepdim=True, dtype=wide)
    return norm.to(compute)
