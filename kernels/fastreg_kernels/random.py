"""Draws counter-based random numbers: each is a function of (key, stream, step, element index).

Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the counter words
(index low, index high, stream, step), where index counts groups of elements that share a call: 4 for
32-bit draws, 8 for 16-bit draws.  A block must start at a multiple of 8; it need not start at 0 of its
tensor, so a shard draws the same numbers as the whole tensor.

The four words of a call are joined so that one thread ends up with contiguous elements, which keeps the
result in the layout of a 128-bit access: nothing goes through shared memory.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class PhiloxPosition(NamedTuple):
    """The position of a block, on which its random numbers depend besides the key."""

    first: Any  # int64, global index of its first element, a multiple of 8
    stream: Any  # uint32, which tensor
    step: Any  # uint32, which step
    vector: Any  # constexpr, contiguous elements a thread holds: 4 (32-bit storage) or 8 (16-bit)


@triton.jit
def words(key, group, at, ROUNDS: tl.constexpr):
    """Four uint32 words for every group index in `group` (int64).

    `tl.philox` with products of 64 bits: a multiplication each where it has two, for the same words.
    """
    c0 = group.to(tl.uint32)
    c1 = (group >> 32).to(tl.uint32)
    c2 = c0 * 0 + at.stream
    c3 = c0 * 0 + at.step
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = b.to(tl.uint32)
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = a.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def join4(a, b, c, d):
    """[n] × 4 → [n, 2, 2], whose row-major order is a, b, c, d."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def interleave(first_half, second_half, like):
    """[n, 2, 2] × 2 → [8 n], whose order is the four of the first, then the four of the second."""
    return tl.reshape(tl.permute(tl.join(first_half, second_half), (0, 3, 1, 2)), like.shape)


@triton.jit
def each_element(function, key, at, like, ROUNDS: tl.constexpr):
    """Draws 4 numbers for each group by `function(key, at, groups, ROUNDS)`, and returns them in order."""
    if at.vector == 8:
        h = at.first // 4 + 2 * tl.arange(0, like.shape[0] // 8)
        return interleave(function(key, at, h, ROUNDS), function(key, at, h + 1, ROUNDS), like)
    else:
        h = at.first // 4 + tl.arange(0, like.shape[0] // 4)
        return tl.reshape(function(key, at, h, ROUNDS), like.shape)


@triton.jit
def uniform_words(key, at, h, ROUNDS: tl.constexpr):
    a, b, c, d = words(key, h, at, ROUNDS)
    return join4(to_uniform(a), to_uniform(b), to_uniform(c), to_uniform(d))


@triton.jit
def to_uniform(word):
    return (word >> 8).to(tl.int32, bitcast=True).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def uniform(key, at, like):
    """Draws a uniform number in [0, 1), a multiple of 2⁻²⁴, for each element of the block `like`."""
    return each_element(uniform_words, key, at, like, 10)


@triton.jit
def bits16(key, at, like, ROUNDS: tl.constexpr):
    """Draws 16 random bits in a uint32 for each element of the block `like`."""
    a, b, c, d = words(key, at.first // 8 + tl.arange(0, like.shape[0] // 8), at, ROUNDS)
    pairs = join4(a, b, c, d)
    return tl.reshape(tl.join(pairs & 0xFFFF, pairs >> 16), like.shape)


@triton.jit
def reaches16(key, at, like, threshold, ROUNDS: tl.constexpr):
    """Whether the 16 random bits of each element reach a threshold below 65536.

    A threshold in the upper half of a word is compared with whole words, so that none is taken apart.
    """
    a, b, c, d = words(key, at.first // 8 + tl.arange(0, like.shape[0] // 8), at, ROUNDS)
    pairs = join4(a, b, c, d)
    halves = tl.reshape(tl.join(pairs << 16, pairs), like.shape)
    return halves >= threshold << 16


@triton.jit
def sin_pi(h):
    """sin(π h) for |h| ≤ 1/2, relative error 2.9e-8 before rounding."""
    y = h * h
    q = 0.07983576506376266 * y - 0.5994373559951782
    q = q * y + 2.550269842147827
    q = q * y - 5.167720794677734
    q = q * y + 3.1415927410125732
    return q * h


@triton.jit
def minus_two_log(high, low):
    """-2 ln((high + low 2⁻³²) 2⁻³²), relative error 3.4e-8 before rounding.

    The clamp keeps the argument below 1, where the square root would meet a negative zero.
    """
    x = tl.minimum((low | 1).to(tl.float32) * 2.3283064365386963e-10 + high.to(tl.float32), 4294967040.0)
    i = x.to(tl.int32, bitcast=True)
    e = (i - 0x4F3504F3) & -8388608
    f = (i - e).to(tl.float32, bitcast=True) * 2.3283064365386963e-10 - 1.0
    q = -0.17013750970363617 * f + 0.2839444875717163
    q = q * f - 0.29901769757270813
    q = q * f + 0.33175957202911377
    q = q * f - 0.39921221137046814
    q = q * f + 0.500019371509552
    q = q * f - 0.6666794419288635
    q = q * f + 1.0
    q = q * f - 2.0
    return q * f - e.to(tl.float32) * 1.6525916635146132e-07


@triton.jit
def box_muller(radius, extra, angle):
    """Two independent normals from a 64-bit radius word pair and a 32-bit angle word."""
    r = tl.sqrt_rn(minus_two_log(radius, extra))
    t = angle.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10
    h = 0.5 - tl.abs(t)
    g = 0.5 - tl.abs(h)
    g = ((angle & 0x80000000) | g.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    return r * sin_pi(h), r * sin_pi(g)


@triton.jit
def normal_words(key, at, h, ROUNDS: tl.constexpr):
    a, b, c, d = words(key, h, at, ROUNDS)
    x, y = box_muller(a, d, b)
    z, w = box_muller(c, b, d)
    return join4(x, y, z, w)


@triton.jit
def normal(key, at, like, ROUNDS: tl.constexpr = 10):
    """Draws a standard normal for each element of the block `like`; |z| is at most 9.42.

    Box–Muller with a 64-bit radius and polynomials instead of libm: no local memory, and the same bits
    as the reference wherever multiply-adds are not fused.
    """
    return each_element(normal_words, key, at, like, ROUNDS)


@triton.jit
def laplace_word(word):
    size = minus_two_log(word, word * 0).to(tl.uint32, bitcast=True)
    return (size | (word << 31)).to(tl.float32, bitcast=True)


@triton.jit
def laplace_words(key, at, h, ROUNDS: tl.constexpr):
    a, b, c, d = words(key, h, at, ROUNDS)
    return join4(laplace_word(a), laplace_word(b), laplace_word(c), laplace_word(d))


@triton.jit
def laplace(key, at, like):
    """Draws a number of the Laplace distribution of scale 2 for each element of the block `like`."""
    return each_element(laplace_words, key, at, like, 10)
