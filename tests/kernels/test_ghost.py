"""Ghost norms and sums over positions: kernel against reference against float64."""

import os

import pytest
import torch

import fastreg
from fastreg.ops import ghost as ghost_ops
from fastreg.reference import ghost as reference

# Sizes below, at and above a tile of 64 positions, 32 or 64 features of a turn and 128 of a program.
SHAPES = [(3, 1, 5, 7), (2, 16, 32, 64), (2, 64, 33, 1), (1, 65, 16, 70), (2, 130, 20, 3)]
DEVICE = os.environ.get("FASTREG_TEST_DEVICE", "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(*shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples, positions, p, d", SHAPES)
def test_ghost_sums(samples, positions, p, d, dtype):
    left, right = drawn((samples, positions, p), (samples, positions, d), dtype=dtype)
    with fastreg.use_backend("triton"):
        actual = ghost_ops.ghost_sums(left, right)
    exact = reference.ghost_sums(left.double(), right.double())
    assert actual.shape == (5, samples) and actual.dtype == torch.float32
    # Each addition may lose a unit in the last place of the sum of magnitudes, on tensor cores, too: so many
    # are in an inner product, and 64 in a row of the sum over a tile and over tiles.
    magnitudes = reference.ghost_sums(left.double().abs(), right.double().abs())
    assert ((actual - exact).abs() <= (p + d + 64) * 2.0**-23 * magnitudes).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("samples, positions, features", [(3, 1, 5), (2, 16, 128), (2, 37, 130)])
def test_sample_sums(samples, positions, features, normalized, dtype):
    grad, x = drawn(*[(samples, positions, features)] * 2, dtype=dtype)
    mean, deviation = drawn(*[(samples, positions)] * 2, dtype=torch.float32)
    others = () if normalized else (mean, deviation)
    with fastreg.use_backend("triton"):
        weight, bias = ghost_ops.sample_sums(grad, x, *others)
        nothing, alone = ghost_ops.sample_sums(grad)
    exact = reference.sample_sums(grad.double(), x.double(), *([t.double() for t in others] or [None, None]))
    for actual, expected in zip((weight, bias), exact, strict=True):
        assert actual.dtype == torch.float32
        assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert nothing is None and torch.equal(alone, bias)


def test_strided_factors():
    left, right = (t.transpose(1, 2) for t in drawn((2, 8, 20), (2, 6, 20), dtype=torch.float32))
    with fastreg.use_backend("triton"):
        actual = ghost_ops.ghost_sums(left, right)
    expected = reference.ghost_sums(left, right)
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_is_deterministic():
    left, right = drawn((2, 70, 20), (2, 70, 9), dtype=torch.float32)
    with fastreg.use_backend("triton"):
        first, second = (ghost_ops.ghost_sums(left, right) for _ in range(2))
    assert torch.equal(first, second)


def test_inner_products_are_kept_while_the_input_is_the_same():
    x, other = drawn((2, 4, 5), (2, 4, 5), dtype=torch.float32)
    grams = ghost_ops.Grams()
    first = grams.of(x)
    assert grams.of(x.view(2, 4, 5)) is first
    assert torch.equal(grams.of(other), reference.gram(other))
    again = grams.of(x)
    x += 1
    assert torch.equal(grams.of(x), reference.gram(x)) and not torch.equal(again, grams.of(x))


@pytest.mark.parametrize("samples", [1, 3])
def test_many_positions_are_taken_some_samples_at_a_time(samples, monkeypatch):
    left, right = drawn((samples, 6, 4), (samples, 6, 5), dtype=torch.float32)
    expected = ghost_ops.ghost_sums(left, right)
    monkeypatch.setattr(ghost_ops, "CHUNK", 36)
    assert torch.equal(ghost_ops.ghost_sums(left, right), expected)


def test_what_is_too_wide_for_the_kernel_is_left_to_the_reference(monkeypatch):
    left, right = drawn((2, 6, 4), (2, 6, 9), dtype=torch.float32)
    monkeypatch.setattr(ghost_ops, "WIDEST", 8)
    monkeypatch.setattr(ghost_ops, "launch", None)
    with fastreg.use_backend("triton"):
        assert torch.equal(ghost_ops.ghost_sums(left, right), reference.ghost_sums(left, right))
