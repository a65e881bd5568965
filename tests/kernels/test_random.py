"""Random numbers of the kernels, bit for bit those of the reference, wherever a block lies."""

import itertools
import os

import numpy as np
import pytest
import torch
from torch import Tensor

from fastreg.reference import random as reference

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

from fastreg_kernels import random as kernels  # noqa: E402  (needs triton)
from fastreg_kernels.random import PhiloxPosition  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs TRITON_INTERPRET=1 or a GPU"
)

SEEDS = (0, -1, 2**40 + 3, -(2**63), 2**63 - 1)
FIRSTS = (0, 2**32 - 16, 2**34 - 16, 2**35 - 16, 2**62)
EXTREMES = (0, 1, 2, 2**23, 2**24 + 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30, 2**32 - 2, 2**32 - 1)

# kat_vectors of Random123: rounds, counter, key, words.
KNOWN_ANSWERS = """
 7  00000000 00000000 00000000 00000000  00000000 00000000  5f6fb709 0d893f64 4f121f81 4f730a48
 7  ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff  5207ddc2 45165e59 4d8ee751 8c52f662
 7  243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0  4dfccaba 190a87f0 c47362ba b6b5242a
10  00000000 00000000 00000000 00000000  00000000 00000000  6627e8d5 e169c58d bc57ac4c 9b00dbd8
10  ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff  408f276d 41c83b0e a20bc7c6 6d5451fd
10  243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0  d16cfe09 94fdcceb 5001e420 24126ea1
"""


@triton.jit
def draw_kernel(
    position, uniforms, normals, bits, reached, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    key = tl.load(position)
    start = tl.program_id(0) * BLOCK
    first = tl.load(position + 1) + start
    stream, step = tl.load(position + 2).to(tl.uint32), tl.load(position + 3).to(tl.uint32)
    offsets = start + tl.arange(0, BLOCK)
    like = tl.zeros([BLOCK], tl.float32)
    # Bound to a local, `PhiloxPosition` would lose its constexpr when compiled.
    tl.store(uniforms + offsets, kernels.uniform(key, PhiloxPosition(first, stream, step, VECTOR), like))
    tl.store(normals + offsets, kernels.normal(key, PhiloxPosition(first, stream, step, VECTOR), like))
    tl.store(
        bits + offsets,
        kernels.bits16(key, PhiloxPosition(first, stream, step, VECTOR), like, ROUNDS).to(tl.int64),
    )
    threshold = step * 0 + 20000
    drawn = kernels.reaches16(key, PhiloxPosition(first, stream, step, VECTOR), like, threshold, ROUNDS)
    tl.store(reached + offsets, drawn.to(tl.int64))


@triton.jit
def words_kernel(position, out, ROUNDS: tl.constexpr):
    group = tl.load(position + 1) + tl.arange(0, 1)
    stream, step = tl.load(position + 2).to(tl.uint32), tl.load(position + 3).to(tl.uint32)
    a, b, c, d = kernels.words(tl.load(position), group, PhiloxPosition(0, stream, step, 4), ROUNDS)
    word = tl.arange(0, 1)
    tl.store(out + word, a.to(tl.int64))
    tl.store(out + word + 1, b.to(tl.int64))
    tl.store(out + word + 2, c.to(tl.int64))
    tl.store(out + word + 3, d.to(tl.int64))


@triton.jit
def box_muller_kernel(radius, extra, angle, z0, z1, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = (
        tl.load(radius + offsets).to(tl.uint32),
        tl.load(extra + offsets).to(tl.uint32),
        tl.load(angle + offsets).to(tl.uint32),
    )
    a, b = kernels.box_muller(words[0], words[1], words[2])
    tl.store(z0 + offsets, a)
    tl.store(z1 + offsets, b)


def signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def draw(position: tuple[int, ...], count: int, block: int, vector: int, rounds: int) -> list[Tensor]:
    """Uniforms, normals, 16 bits and whether these reach 20000, from `(key, first, stream, step)` on."""
    out = [
        torch.empty(count, dtype=dtype, device=DEVICE)
        for dtype in (torch.float32, torch.float32, torch.int64, torch.int64)
    ]
    draw_kernel[(count // block,)](
        torch.tensor(position, device=DEVICE), *out,
        BLOCK=block, VECTOR=vector, ROUNDS=rounds, enable_fp_fusion=False,
    )  # fmt: skip
    return [tensor.cpu() for tensor in out]


def expected(position: tuple[int, ...], count: int, rounds: int) -> list[Tensor]:
    key, first, stream, step = position
    at, like = reference.PhiloxPosition(first, 0, stream, step), torch.empty(count)
    return [
        reference.uniform(key, at, like),
        reference.normal(key, at, like),
        reference.bits16(key, at, like, rounds),
        reference.reaches16(key, at, like, torch.tensor(20000), rounds),
    ]


@pytest.mark.parametrize("line", KNOWN_ANSWERS.strip().splitlines())
def test_philox_gives_the_published_words(line: str) -> None:
    rounds, *words = line.split()
    c0, c1, c2, c3, k0, k1, *answer = (int(word, 16) for word in words)
    position = torch.tensor([signed(k0 | k1 << 32), signed(c0 | c1 << 32), c2, c3], device=DEVICE)
    out = torch.empty(4, dtype=torch.int64, device=DEVICE)
    words_kernel[(1,)](position, out, ROUNDS=int(rounds))
    assert out.tolist() == answer


@pytest.mark.parametrize("vector, rounds", ((4, 10), (8, 7)))
@pytest.mark.parametrize("first", FIRSTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_draws_are_those_of_the_reference(seed: int, first: int, vector: int, rounds: int) -> None:
    position = seed, first, 5, 9
    drawn = draw(position, 256, 128, vector, rounds)
    assert all(map(torch.equal, drawn, expected(position, 256, rounds)))


@pytest.mark.parametrize(
    "stream, step", ((0, 0), (2**32 - 1, 1), (1, 2**32 - 1), (-1, 2**32 + 5), (2**32 + 5, -1))
)
def test_streams_and_steps_count_by_their_low_32_bits(stream: int, step: int) -> None:
    position = 3, 0, stream, step
    for got, value in zip(draw(position, 128, 128, 4, 10), expected(position, 128, 10), strict=True):
        assert torch.equal(got, value)


@pytest.mark.parametrize("vector", (4, 8))
@pytest.mark.parametrize("block", (128, 1024, 4096))
def test_the_block_does_not_matter(block: int, vector: int) -> None:
    position = -1, 2**34 - 2048, 1, 2
    for got, value in zip(draw(position, 4096, block, vector, 10), expected(position, 4096, 10), strict=True):
        assert torch.equal(got, value)


def box_muller(words: list[Tensor], **options: bool) -> Tensor:
    out = torch.empty(2, len(words[0]), device=DEVICE)
    grid = (len(words[0]) // 1024,)
    box_muller_kernel[grid](*(w.to(DEVICE) for w in words), *out.unbind(), BLOCK=1024, **options)
    return out.cpu()


def some_words() -> list[Tensor]:
    """All combinations of the extreme words, then random ones."""
    grid = np.array(list(itertools.product(EXTREMES, repeat=3))).T
    drawn = np.random.default_rng(0).integers(0, 2**32, (3, 2**16 - grid.shape[1]))
    return [torch.from_numpy(w) for w in np.concatenate((grid, drawn), 1)]


def test_normals_from_any_words_are_those_of_the_reference() -> None:
    words = some_words()
    drawn = box_muller(words, enable_fp_fusion=False)
    assert torch.equal(drawn, torch.stack(reference._box_muller(*words)))
    assert drawn.max() > 9.4 and drawn.min() < -9.4


def test_normals_are_within_5_ulp_of_float64_where_multiply_adds_fuse() -> None:
    words = some_words()
    radius, extra, angle = (w.numpy() for w in words)
    u = np.float32(2**-32) * (extra | 1).astype(np.float32) + radius.astype(np.float32)
    u = np.minimum(u, np.float32(2**32 - 2**8)).astype(np.float64) / 2**32
    turn = angle.astype(np.uint32).view(np.int32).astype(np.float32) / np.float32(2**31)
    h = np.float32(0.5) - np.abs(turn)
    g = np.copysign(np.float32(0.5) - np.abs(h), turn)
    z = np.sqrt(-2 * np.log(u)) * np.sin(np.pi * np.stack((h, g)).astype(np.float64))
    ulp = np.spacing(np.abs(z).astype(np.float32)).astype(np.float64)
    assert (np.abs(box_muller(words).numpy() - z) / ulp).max() <= 5
