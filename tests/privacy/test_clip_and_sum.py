"""Clipping of materialized per-sample gradients against loops over samples."""

import math
import os

import pytest
import torch

from fastreg.privacy.clipped_sums import clip_and_sum

DEVICE = os.environ.get("FASTREG_TEST_DEVICE", "cpu")
SHAPES = [(9, 31), (127,), (), (0,), (4096 + 17,), (4, 64)]
TINY = 2.0**-20


def draw(samples=5, dtypes=(torch.float32,), scale=1.0):
    generator = torch.Generator().manual_seed(samples)
    return [
        (scale * torch.randn(samples, *shape, generator=generator)).to(DEVICE, dtypes[i % len(dtypes)])
        for i, shape in enumerate(SHAPES)
    ]


def sums(samples):
    wide = {torch.float64: torch.float64}
    return [torch.zeros(g.shape[1:], dtype=wide.get(g.dtype, torch.float32), device=DEVICE) for g in samples]


def loop(samples, max_norms):
    """One sample at a time, in double."""
    out = [torch.zeros(g.shape[1:], dtype=torch.float64, device=DEVICE) for g in samples]
    for sample in zip(*(g.double().unbind() for g in samples), strict=True):
        norms = [float(g.norm()) for g in sample]
        if len(max_norms) == 1:
            norms = [math.hypot(*norms)]
        factors = [min(c / (norm + 1e-6), 1.0) for c, norm in zip(max_norms, norms, strict=True)]
        for i, g in enumerate(sample):
            out[i] += factors[i % len(factors)] * g
    return out


def clip(samples, max_norms, out=None):
    out = sums(samples) if out is None else out
    return out, clip_and_sum(samples, out, max_norms)


FLAT, LAYERS = [3.0], [0.5, 0.1, 9.0, 1.0, 0.3, 2.0]
DTYPES = [
    (torch.float32,), (torch.bfloat16,), (torch.float16,), (torch.float64,), (torch.bfloat16, torch.float32)
]  # fmt: skip


@pytest.mark.parametrize(
    "dtypes, max_norms", [*((dtypes, FLAT) for dtypes in DTYPES), (DTYPES[0], LAYERS)], ids=str
)
def test_equals_a_loop_over_samples(dtypes, max_norms, close):
    samples = draw(dtypes=dtypes)
    out, clipped = clip(samples, max_norms)
    close(out, [expected.to(g.dtype) for expected, g in zip(loop(samples, max_norms), out, strict=True)])
    assert clipped.norms.shape == clipped.factors.shape == (len(max_norms), 5)


@pytest.mark.parametrize("max_norms", [FLAT, LAYERS], ids=["flat", "per layer"])
def test_norms_and_factors_are_those_of_float64(max_norms):
    samples = draw(3)
    _, clipped = clip(samples, max_norms)
    squares = torch.stack([g.double().reshape(3, -1).square().sum(1) for g in samples])
    norms = (squares if len(max_norms) > 1 else squares.sum(0, keepdim=True)).sqrt()
    limits = torch.tensor(max_norms, dtype=torch.float64, device=DEVICE).unsqueeze(1)
    expected = norms, (limits / (norms + 1e-6)).clamp(max=1.0)
    torch.testing.assert_close(tuple(clipped), expected, rtol=1e-13, atol=0)


def test_the_same_bits_every_time():
    samples = draw(3)
    assert all(map(torch.equal, clip(samples, [1.0])[0], clip(samples, [1.0])[0]))


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_a_matrix_that_is_read_in_parts(bad, close):
    """Columns that no copy holds all at once, the last of them fewer."""
    samples = [torch.randn(700, 3001, generator=torch.Generator().manual_seed(0)).to(DEVICE)]
    samples[0][5, 3000] += bad
    out, clipped = clip(samples, [9.0])
    kept = samples[0].isfinite().all(1)
    close(out, [g.float() for g in loop([samples[0][kept]], [9.0])])
    assert torch.equal(clipped.factors[0] > 0, kept)


def test_reduced_precision_of_products_is_not_used():
    samples = draw(4)
    expected, _ = clip(samples, [2.0])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out, _ = clip(samples, [2.0])
    assert all(map(torch.equal, out, expected))


def test_accumulates(close):
    samples = draw(4)
    whole, _ = clip(samples, [2.0])
    out, _ = clip([g[:3] for g in samples], [2.0])
    clip([g[3:] for g in samples], [2.0], out)
    close(out, whole)


def test_no_samples():
    samples = draw(0)
    out, clipped = clip(samples, [2.0], [torch.ones_like(g) for g in sums(samples)])
    assert all(bool((g == 1).all()) for g in out) and clipped.norms.shape == (1, 0)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("max_norms", [FLAT, LAYERS], ids=["flat", "per layer"])
def test_samples_that_are_not_finite_count_for_nothing(bad, max_norms, close):
    """Flat clipping drops the whole sample; per-layer clipping drops it only in that layer."""
    samples = draw(5)
    samples[0][2, 3, 4] = bad
    out, clipped = clip(samples, max_norms)
    without = [g[[0, 1, 3, 4]] for g in samples]
    expected, _ = clip(without, max_norms)
    close(out if len(max_norms) == 1 else out[:1], expected if len(max_norms) == 1 else expected[:1])
    assert clipped.factors[0].tolist().count(0.0) == 1


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30, 5e37])
def test_no_sample_is_longer_than_it_may_be(scale):
    """Measured in double: its clipped norm exceeds C by less than a millionth.

    A norm so large that float32 has no factor for it counts for nothing.
    """
    out, _ = clip(draw(1, scale=scale), [0.7])
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in out))
    assert norm <= 0.7 * (1 + TINY)
    assert norm > 0.69 if 1 <= scale <= 1e30 else norm < 0.1


def test_rows_in_any_layout(close):
    samples = draw(4)
    odd = [torch.stack([g, g], -1)[..., 0] for g in samples]  # every second element, at odd addresses
    assert not odd[0].is_contiguous()
    close(clip(odd, [2.0])[0], clip(samples, [2.0])[0])
