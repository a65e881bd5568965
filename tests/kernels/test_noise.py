"""Noise on activations: the kernel against the reference, over several blocks."""

import math

import pytest
import torch

import fastreg
from fastreg.ops import noise as noise_ops
from fastreg.reference.noise import KINDS
from fastreg.runtime.launch_parameters import LaunchParameters, trying

SEED = torch.tensor(2**40 + 3)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def small_blocks():
    """So that few elements take several programs, each of several rounds of the wide loop."""
    with trying("noise", LaunchParameters(2048, per_thread=8)):
        yield


def draw(shape, dtype=torch.float32, seed=0):
    made = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype)


def run(x, scale, kind, inner=1, backend="triton", seed=SEED):
    with fastreg.use_backend(backend):
        return noise_ops.noise(x, seed, scale, inner, kind)


def compare(x, scale, kind, inner=1, same=torch.equal):
    """The bits of the reference; of bfloat16 within a unit, since the interpreter truncates."""
    actual, expected = run(x, scale, kind, inner), run(x, scale, kind, inner, "reference")
    assert actual.dtype == expected.dtype == x.dtype and actual.shape == x.shape
    if x.dtype == torch.bfloat16:
        # A unit in the last place: eps is relative to the lower end of a binade.
        bound = torch.finfo(x.dtype).eps * expected.double().abs()
        assert ((actual.double() - expected.double()).abs() <= bound).all()
    elif x.dtype == torch.float64:
        assert ((actual - expected).abs() <= 1e-6 * expected.abs().max()).all()
    else:
        assert same(actual, expected)
    assert not torch.equal(actual, x)


def rows(count, seed=1):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


@DTYPES
@ALL_KINDS
def test_one_scale(kind, dtype, same):
    compare(draw(4501, dtype), torch.tensor(0.3), kind, same=same)


@DTYPES
@ALL_KINDS
@pytest.mark.parametrize("inner", [768, 771], ids=["in groups", "odd"])
def test_a_scale_for_each_row(inner, kind, dtype, same):
    compare(draw((5, inner), dtype), rows(5), kind, inner, same)


@pytest.mark.parametrize("inner", [1, 3, 8, 4096, 5000])
def test_rows_of_any_length(inner, same):
    x = draw(5000 // inner * inner)
    compare(x, rows(len(x) // inner), "uniform", inner, same)


def test_rows_of_64_bits_are_indexed(monkeypatch, same):
    """So long a row does not fit here; its kernel does."""
    x = draw(4500)
    monkeypatch.setattr(noise_ops, "NOISE", noise_ops.NOISE._replace(constants=wide))
    compare(x, rows(6), "additive", 750, same)


def wide(shared, inner, *others, constants=noise_ops.NOISE.constants):
    index = constants(shared, 2**30, *others)["INDEX"]
    assert str(index) == "int64"
    return {**constants(shared, inner, *others), "INDEX": index}


@pytest.mark.parametrize("size", [*range(1, 18), 2047, 2049])
def test_sizes(size, same):
    compare(draw(size), torch.tensor(0.5), "additive", same=same)
    compare(draw(size), rows(size), "multiplicative", same=same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip", [1, 4])
def test_starts_amid_an_allocation(skip, dtype, same):
    """Not at a multiple of 16 bytes, and as it would be elsewhere."""
    x = draw(3000 + skip, dtype)[skip:]
    compare(x, torch.tensor(0.3), "additive", same=same)
    assert torch.equal(run(x, torch.tensor(0.3), "additive"), run(x.clone(), torch.tensor(0.3), "additive"))


@DTYPES
@ALL_KINDS
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_scale_of_0_leaves_every_bit(kind, dtype, backend):
    """Infinities and the signs of zeros, too."""
    x = draw((6, 256), dtype)
    x[:, :3] = torch.tensor([-0.0, math.inf, -math.inf], dtype=dtype)
    for actual in (run(x, torch.tensor(0.0), kind, 1, backend), run(x, torch.zeros(6), kind, 256, backend)):
        assert torch.equal(actual.view(torch.uint8), x.view(torch.uint8))
    some = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    actual = run(x, some, kind, 256, backend)
    untouched = (actual.view(6, -1).view(torch.uint8) == x.view(torch.uint8)).all(1)
    assert untouched.tolist() == (some == 0).tolist()


@pytest.mark.slow(kind="additive")
@pytest.mark.parametrize("kind, dtype, inner", [
    ("additive", torch.float32, 1), ("uniform", torch.bfloat16, 771),
])  # fmt: skip
def test_compiled_equals_the_reference(kind, dtype, inner):
    x, scale = draw((13, 771), dtype), torch.tensor(0.3) if inner == 1 else rows(13)
    actual, expected = run(x, scale, kind, inner, "compiled"), run(x, scale, kind, inner, "reference")
    assert actual.dtype == dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("block, per_thread", [(1024, 8), (8192, 16)])
def test_the_same_noise_for_every_block(block, per_thread):
    x = draw(5001)
    expected = run(x, torch.tensor(0.3), "additive")
    with trying("noise", LaunchParameters(block, per_thread=per_thread)):
        assert torch.equal(run(x, torch.tensor(0.3), "additive"), expected)


@pytest.mark.parametrize("backend", ["reference", "compiled", "triton"])
def test_nothing_is_done_for_no_elements(backend):
    assert run(torch.empty(0, 8), torch.tensor(0.3), "additive", 1, backend).shape == (0, 8)
    assert run(torch.empty(0, 8), torch.empty(0), "uniform", 8, backend).shape == (0, 8)
