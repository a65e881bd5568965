"""Draws counter-based random numbers, bit for bit those of `fastreg_kernels.random` (see there).

Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") on int64 tensors that hold
uint32 values.  No product relies on wrap-around, which Inductor does not promise.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


class PhiloxPosition(NamedTuple):
    """The position of a run of elements, on which its random numbers depend besides the key."""

    first: int | Tensor  # global index of its first element, rounded down to a multiple of 8
    skip: int  # elements that the rounding added in front, 0 to 7
    stream: int | Tensor  # which tensor
    step: int | Tensor  # which step


def _multiply(m: int, c: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of m · c; with m - 2³² as factor the product stays within an int64."""
    t = c * (m - 2**32)
    return (t >> 32) + c, t & _MASK


def philox(
    counter: tuple[Tensor, ...], key: tuple[Tensor | int, Tensor | int], rounds: int
) -> tuple[Tensor, ...]:
    """Computes Philox4x32: four uint32 words from four counter words and two key words, all in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def words(
    key: int | Tensor, at: PhiloxPosition, count: int, per_call: int, rounds: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Computes four words for each call, where `count` elements take one call for every `per_call`."""
    calls = (at.skip + count + per_call - 1) // per_call
    group = at.first // per_call + torch.arange(calls, dtype=torch.int64, device=device)
    zero = torch.zeros_like(group)
    counter = (group & _MASK, group >> 32, zero + (at.stream & _MASK), zero + (at.step & _MASK))
    return philox(counter, (key & _MASK, (key >> 32) & _MASK), rounds)


def _in_order(columns: tuple[Tensor, ...], at: PhiloxPosition, count: int) -> Tensor:
    return torch.stack(columns, -1).reshape(-1)[at.skip : at.skip + count]


def uniform(key: int | Tensor, at: PhiloxPosition, like: Tensor) -> Tensor:
    """Draws a uniform float32 in [0, 1), a multiple of 2⁻²⁴, for each element of the flat tensor `like`."""
    drawn = words(key, at, like.numel(), 4, 10, like.device)
    return _in_order(tuple((word >> 8).float() * 2.0**-24 for word in drawn), at, like.numel())


def bits16(key: int | Tensor, at: PhiloxPosition, like: Tensor, rounds: int) -> Tensor:
    """Draws 16 random bits in an int32 for each element of the flat tensor `like`."""
    drawn = words(key, at, like.numel(), 8, rounds, like.device)
    halves = tuple(half.to(torch.int32) for word in drawn for half in (word & 0xFFFF, word >> 16))
    return _in_order(halves, at, like.numel())


def reaches16(key: int | Tensor, at: PhiloxPosition, like: Tensor, threshold: Tensor, rounds: int) -> Tensor:
    """Returns whether the 16 random bits of each element of the flat `like` reach a threshold up to 65536."""
    if threshold.dim() or torch.compiler.is_compiling():  # compiled, this is four times faster
        return bits16(key, at, like, rounds) >= threshold
    drawn, limit = words(key, at, like.numel(), 8, rounds, like.device), threshold.long()
    # A threshold in the upper half of a word is compared with whole words.
    halves = tuple(half for word in drawn for half in ((word & 0xFFFF) >= limit, word >= limit << 16))
    return _in_order(halves, at, like.numel())


def sqrt(x: Tensor) -> Tensor:
    """Returns the correctly rounded square root: eager float32 on a CPU is 1 ulp off in 16 % of values."""
    if torch.compiler.is_compiling() or x.dtype == torch.float64 or x.device.type != "cpu":
        return x.sqrt()
    return x.double().sqrt().to(x.dtype)


# Coefficients stand in the calls: Dynamo would take global floats for values that may change.


def _horner(x: Tensor, *coefficients: float) -> Tensor:
    q = coefficients[0] * x + coefficients[1]
    for c in coefficients[2:]:
        q = q * x + c
    return q


def _sin_pi(h: Tensor) -> Tensor:
    """sin(π h) for |h| ≤ 1/2, relative error 2.9e-8 before rounding."""
    return _horner(
        h * h, 0.07983576506376266, -0.5994373559951782, 2.550269842147827,
        -5.167720794677734, 3.1415927410125732,
    ) * h  # fmt: skip


def _minus_two_log(high: Tensor, low: Tensor) -> Tensor:
    """-2 ln((high + low 2⁻³²) 2⁻³²), relative error 3.4e-8 before rounding."""
    x = ((low | 1).float() * 2.0**-32 + high.float()).clamp(max=4294967040.0)
    i = x.view(torch.int32)
    e = (i - 0x4F3504F3) & -8388608
    f = (i - e).view(torch.float32) * 2.0**-32 - 1.0
    log1p = _horner(
        f, -0.17013750970363617, 0.2839444875717163, -0.29901769757270813, 0.33175957202911377,
        -0.39921221137046814, 0.500019371509552, -0.6666794419288635, 1.0, -2.0,
    ) * f  # fmt: skip
    return log1p - e.float() * 1.6525916635146132e-07


def _box_muller(radius: Tensor, extra: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent normals from a 64-bit radius word pair and a 32-bit angle word."""
    r = sqrt(_minus_two_log(radius, extra))
    t = (angle - ((angle >> 31) << 32)).float() * 2.0**-31
    h = 0.5 - t.abs()
    g = 0.5 - h.abs()
    g = torch.where(t < 0, -g, g)
    return r * _sin_pi(h), r * _sin_pi(g)


def normal(key: int | Tensor, at: PhiloxPosition, like: Tensor, rounds: int = 10) -> Tensor:
    """Draws a standard normal float32 for each element of the flat tensor `like`; |z| is at most 9.42.

    Box–Muller (1958): the radius from 64 bits, the angle from 32, both functions from polynomials, so that
    no library function can differ between backends.
    """
    a, b, c, d = words(key, at, like.numel(), 4, rounds, like.device)
    return _in_order((*_box_muller(a, d, b), *_box_muller(c, b, d)), at, like.numel())


def laplace(key: int | Tensor, at: PhiloxPosition, like: Tensor) -> Tensor:
    """Draws a float32 of the Laplace distribution of scale 2 for each element of the flat tensor `like`.

    A word makes the size, -2 ln(word 2⁻³²), and its last bit, which hardly changes the size, the sign.
    """
    drawn = words(key, at, like.numel(), 4, 10, like.device)
    values = (
        torch.where((word & 1) == 1, -size, size)
        for word in drawn
        for size in (_minus_two_log(word, torch.zeros_like(word)),)
    )
    return _in_order(tuple(values), at, like.numel())
