"""Random numbers against published vectors, exact integers, float64, statistics and their compiled form."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fastreg.common.random import Purpose, key
from fastreg.reference import random
from fastreg.reference.random import PhiloxPosition
from fastreg.runtime import backend

MASK = 0xFFFFFFFF
DRAWS = 10**6
FOUR_SIGMA = 2 * stats.norm.sf(4)  # of a p-value

# kat_vectors of Random123: rounds, counter, key, words.
KNOWN_ANSWERS = """
 7  00000000 00000000 00000000 00000000  00000000 00000000  5f6fb709 0d893f64 4f121f81 4f730a48
 7  ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff  5207ddc2 45165e59 4d8ee751 8c52f662
 7  243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0  4dfccaba 190a87f0 c47362ba b6b5242a
10  00000000 00000000 00000000 00000000  00000000 00000000  6627e8d5 e169c58d bc57ac4c 9b00dbd8
10  ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff  408f276d 41c83b0e a20bc7c6 6d5451fd
10  243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0  d16cfe09 94fdcceb 5001e420 24126ea1
"""

SEEDS = (0, -1, 2**40 + 3, -(2**63), 2**63 - 1)
# Into the second word of the index, counted in elements, in groups of four and in groups of eight.
FIRSTS = (0, 2**32 - 16, 2**34 - 16, 2**35 - 16, 2**62)
# The words at which something in Box-Muller changes: sign, quadrant, rounding, exponent.
EXTREMES = (0, 1, 2, 2**23, 2**24 + 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30, 2**32 - 2, 2**32 - 1)


def philox(counter: tuple[int, ...], seed: tuple[int, ...], rounds: int) -> tuple[int, ...]:
    """Philox4x32 as in the paper, in integers of any size."""
    (c0, c1, c2, c3), (k0, k1) = counter, seed
    for _ in range(rounds):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = product1 >> 32 ^ c1 ^ k0, product1 & MASK, product0 >> 32 ^ c3 ^ k1, product0 & MASK
        k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
    return c0, c1, c2, c3


def words_of(seed: int, group: int, stream: int, step: int, rounds: int) -> tuple[int, ...]:
    return philox((group & MASK, group >> 32, stream, step), (seed & MASK, seed >> 32 & MASK), rounds)


def words_at_random(count: int) -> list[Tensor]:
    """Three lists of uint32 words: `count` random ones and all combinations of the extreme ones."""
    grid = np.array(list(itertools.product(EXTREMES, repeat=3))).T
    drawn = np.random.default_rng(0).integers(0, 2**32, (3, count))
    return [torch.from_numpy(w) for w in np.concatenate((grid, drawn), 1)]


def all_draws(
    seed: Tensor | int, first: Tensor | int, stream: Tensor | int, step: Tensor | int, like: Tensor
):
    at = PhiloxPosition(first, 0, stream, step)
    return (
        random.uniform(seed, at, like),
        random.normal(seed, at, like),
        random.bits16(seed, at, like, 7),
        random.bits16(seed, at, like, 10),
    )


@pytest.mark.parametrize("line", KNOWN_ANSWERS.strip().splitlines())
def test_philox_gives_the_published_words(line: str) -> None:
    rounds, *words = line.split()
    c0, c1, c2, c3, k0, k1, *expected = (int(word, 16) for word in words)
    counter = tuple(torch.tensor([word]) for word in (c0, c1, c2, c3))
    drawn = random.philox(counter, (k0, k1), int(rounds))
    assert [word.item() for word in drawn] == expected
    assert philox((c0, c1, c2, c3), (k0, k1), int(rounds)) == tuple(expected)


def test_philox_is_exact_for_any_words() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, (200, 6))
    words[:100] = np.random.default_rng(1).choice(EXTREMES, (100, 6))
    for rounds in (7, 10):
        columns = torch.from_numpy(words).unbind(1)
        drawn = torch.stack(random.philox(columns[:4], columns[4:], rounds), 1).tolist()
        assert drawn == [list(philox(row[:4], row[4:], rounds)) for row in map(tuple, words.tolist())]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("first", FIRSTS)
def test_every_element_has_its_own_place_in_the_counter(seed: int, first: int) -> None:
    stream, step = 5, 9
    uniform, _, *bits = all_draws(seed, first, stream, step, torch.empty(40))
    index = range(first, first + 40)
    four = [words_of(seed, i // 4, stream, step, 10)[i % 4] for i in index]
    assert uniform.tolist() == [(word >> 8) / 2**24 for word in four]
    for rounds, drawn in zip((7, 10), bits, strict=True):
        eight = [words_of(seed, i // 8, stream, step, rounds)[i % 8 // 2] for i in index]
        assert drawn.tolist() == [
            word >> 16 if i % 2 else word & 0xFFFF for i, word in zip(index, eight, strict=True)
        ]


@pytest.mark.parametrize("first", FIRSTS)
def test_four_normals_use_each_word_of_their_call(first: int) -> None:
    seed, stream, step = 2**40 + 3, 5, 9
    expected = []
    for group in range(first // 4, first // 4 + 6):
        a, b, c, d = (torch.tensor(word) for word in words_of(seed, group, stream, step, 10))
        expected += [*random._box_muller(a, d, b), *random._box_muller(c, b, d)]
    drawn = random.normal(seed, PhiloxPosition(first, 0, stream, step), torch.empty(24))
    assert drawn.tolist() == [float(z) for z in expected]


@pytest.mark.parametrize("first", FIRSTS)
@pytest.mark.parametrize("start", (0, 1, 3, 4, 7, 8, 13, 21))
def test_a_part_draws_what_the_whole_draws_there(first: int, start: int) -> None:
    whole = all_draws(7, first, 3, 11, torch.empty(64))
    for count in (0, 1, 5, 43):
        at, like = PhiloxPosition(first + start - start % 8, start % 8, 3, 11), torch.empty(count)
        part = (
            random.uniform(7, at, like),
            random.normal(7, at, like),
            random.bits16(7, at, like, 7),
            random.bits16(7, at, like, 10),
        )
        for got, expected in zip(part, whole, strict=True):
            assert torch.equal(got, expected[start : start + count])


def box_muller_in_float64(words: list[Tensor]) -> np.ndarray:
    """Both normals from words; only what float32 can tell of radius and angle is taken over from there."""
    radius, extra, angle = (w.numpy() for w in words)
    u = np.float32(2**-32) * (extra | 1).astype(np.float32) + radius.astype(np.float32)
    u = np.minimum(u, np.float32(2**32 - 2**8)).astype(np.float64) / 2**32
    turn = angle.astype(np.uint32).view(np.int32).astype(np.float32) / np.float32(2**31)
    h = np.float32(0.5) - np.abs(turn)
    g = np.copysign(np.float32(0.5) - np.abs(h), turn)
    return np.sqrt(-2 * np.log(u)) * np.sin(np.pi * np.stack((h, g)).astype(np.float64))


def test_normals_are_within_5_ulp_of_float64() -> None:
    words = words_at_random(10**6)
    expected = box_muller_in_float64(words)
    drawn = torch.stack(random._box_muller(*words)).numpy()
    ulp = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    assert (np.abs(drawn - expected) / ulp).max() <= 5


def test_normals_reach_9_sigma_on_both_sides() -> None:
    reach = math.sqrt(-2 * math.log(2**-64))
    zero = torch.tensor([0])
    quarters = ((reach, 0), (0, reach), (-reach, 0), (0, -reach))
    for angle, expected in zip(range(0, 2**32, 2**30), quarters, strict=True):
        drawn = [float(z) for z in random._box_muller(zero, zero, torch.tensor([angle]))]
        assert drawn == pytest.approx(expected, rel=2**-22), f"{angle=}"
    assert reach > 9.4


@pytest.mark.slow  # the compiler needs half a minute for the unrolled rounds
@pytest.mark.skipif(not backend.has_compiler(), reason="torch.compile needs a C++ compiler")
def test_compiled_draws_are_the_same_bits() -> None:
    def everything(seed: Tensor, first: Tensor, stream: Tensor, step: Tensor, like: Tensor, *words: Tensor):
        at = PhiloxPosition(first, 0, stream, step)
        return (
            random.uniform(seed, at, like),
            random.normal(seed, at, like),
            random.bits16(seed, at, like, 7),
            *random._box_muller(*words),
        )

    compiled = torch.compile(everything, dynamic=True, fullgraph=True)
    words = words_at_random(10**4)
    for seed, first, count in itertools.product(SEEDS, FIRSTS, (1003, 40)):
        position = [torch.tensor(value) for value in (seed, first, 5, 9)]
        expected = everything(*position, torch.empty(count), *words)
        for got, value in zip(compiled(*position, torch.empty(count), *words), expected, strict=True):
            assert got.dtype == value.dtype
            assert torch.equal(got, value), f"{seed=} {first=} {count=}"


@functools.cache
def normals(seed: int = 3, stream: int = 0, step: int = 1, first: int = 0) -> np.ndarray:
    drawn = random.normal(seed, PhiloxPosition(first, 0, stream, step), torch.empty(DRAWS))
    return drawn.numpy().astype(np.float64)


def assert_uncorrelated(a: np.ndarray, b: np.ndarray, what: str) -> None:
    assert abs(np.corrcoef(a, b)[0, 1]) * math.sqrt(len(a)) < 4, what


def assert_no_lags(x: np.ndarray, what: str) -> None:
    for lag in range(1, 17):
        assert_uncorrelated(x[:-lag], x[lag:], f"{what}, lag {lag}")


def test_normals_are_normal() -> None:
    z = normals()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 4 * math.sqrt(variance / DRAWS), f"moment {power}"
    assert stats.kstest(z, "norm").pvalue > FOUR_SIGMA
    for limit in (2, 3, 4):
        share = 2 * stats.norm.sf(limit)
        actual = (np.abs(z) > limit).mean()
        assert abs(actual - share) < 4 * math.sqrt(share * (1 - share) / DRAWS), f"beyond {limit}"


def test_uniforms_are_uniform() -> None:
    u = random.uniform(3, PhiloxPosition(0, 0, 0, 1), torch.empty(DRAWS)).numpy().astype(np.float64)
    assert u.min() >= 0 and u.max() < 1
    for power in (1, 2, 3, 4):
        variance = 1 / (2 * power + 1) - 1 / (power + 1) ** 2
        assert abs((u**power).mean() - 1 / (power + 1)) < 4 * math.sqrt(variance / DRAWS), f"moment {power}"
    assert stats.kstest(u, "uniform").pvalue > FOUR_SIGMA
    assert_no_lags(u, "uniforms")


@pytest.mark.parametrize("rounds", (7, 10))
def test_16_bits_are_fair_and_independent(rounds: int) -> None:
    drawn = random.bits16(3, PhiloxPosition(0, 0, 0, 1), torch.empty(DRAWS), rounds).numpy()
    counts = np.bincount(drawn, minlength=2**16)
    assert len(counts) == 2**16
    assert stats.chisquare(counts).pvalue > FOUR_SIGMA
    bits = (drawn[:, None] >> np.arange(16) & 1).astype(np.float64)
    assert (np.abs(bits.mean(0) - 0.5) < 4 * 0.5 / math.sqrt(DRAWS)).all()
    correlations = np.corrcoef(bits.T)[np.triu_indices(16, 1)]
    assert (np.abs(correlations) < 4 / math.sqrt(DRAWS)).all()
    assert_no_lags(drawn.astype(np.float64), "16 bits")


def test_normals_of_a_tensor_do_not_know_each_other() -> None:
    z = normals()
    assert_no_lags(z, "normals")
    assert_no_lags(z**2, "their squares, which share radius words")


OTHERS = {
    "tensor": {"stream": 1},
    "step": {"step": 2},
    "seed": {"seed": 4},
    "purpose": {"seed": key(3, Purpose.PRIVACY)},
    "index beyond 2³²": {"first": 2**32},
    "index beyond 2³⁴": {"first": 2**34},
    "tensor and step exchanged": {"stream": 1, "step": 0},
}


@pytest.mark.parametrize("what", OTHERS)
def test_normals_of_another_do_not_know_those_of_the_first(what: str) -> None:
    z, other = normals(), normals(**OTHERS[what])
    assert_uncorrelated(z, other, what)
    assert_uncorrelated(z**2, other**2, "squares")
    assert_uncorrelated(np.abs(z), other, "size and value")
