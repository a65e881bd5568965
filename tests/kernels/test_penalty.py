"""Sums of squares and of magnitudes, and their gradients: kernel against reference against float64."""

import math

import pytest
import torch

import fastreg
from fastreg.ops.penalty import L1, L2, _batch, penalty, penalty_gradients

SIZES = [(1,), (5, 7), (0,), (4096 + 45,)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def draw(dtype=torch.float32, offset=0):
    """Tensors that start `offset` elements behind where an allocation does; zeros among them."""
    generator = torch.Generator().manual_seed(3)
    tensors = []
    for size in SIZES:
        store = torch.empty(math.prod(size) + offset, dtype=dtype)[offset:].view(size)
        tensors.append(store.copy_(torch.randn(size, generator=generator, dtype=torch.float64)))
        tensors[-1][:1] = 0
    return tensors


def exact(tensors, absolute):
    return math.fsum(float((t.double().abs() if absolute else t.double().square()).sum()) for t in tensors)


def slopes(tensors, absolute):
    return [t.double().sign() if absolute else 2 * t.double() for t in tensors]


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_is_that_of_float64(backend, dtype, absolute, offset):
    tensors = draw(dtype, offset)
    value = penalty(tensors, absolute)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bound = 1e-12 if dtype == torch.float64 else 3e-7
    assert abs(float(value) - exact(tensors, absolute)) <= bound * exact(tensors, absolute)


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_kernels_equal_the_reference(dtype, absolute, offset):
    """16 bits: but for the interpreter's rounding, which truncates to bfloat16."""
    tensors, gradient = draw(dtype, offset), torch.tensor(0.37, dtype=torch.float64)
    results = {}
    for name in ("reference", "triton"):
        with fastreg.use_backend(name):
            results[name] = penalty_gradients(gradient, tensors, absolute)
    for ours, twin, slope in zip(
        results["triton"], results["reference"], slopes(tensors, absolute), strict=True
    ):
        assert ours.dtype == twin.dtype == dtype
        # A rounding each of g and of the product, in float32 where tensors are narrower; halves underflow.
        eps = torch.finfo(dtype).eps + (0 if dtype == torch.float64 else torch.finfo(torch.float32).eps)
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        for each in (ours, twin):
            assert ((each.double() - 0.37 * slope).abs() <= eps * 0.37 * slope.abs() + least).all()
        if dtype in (torch.float32, torch.float64):
            assert torch.equal(ours, twin)


def test_compiled_gradients_equal_the_reference():
    tensors, gradient = draw(), torch.tensor(-1.7)
    results = {}
    for name in ("reference", "compiled"):
        with fastreg.use_backend(name):
            results[name] = penalty_gradients(gradient, tensors, False)
    assert all(map(torch.equal, results["compiled"], results["reference"]))


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("name", ["reference", "triton"])
def test_mixed_dtypes_and_layouts(name, absolute):
    generator = torch.Generator().manual_seed(4)
    wide = torch.randn(6, 5, 4, 3, generator=generator)
    tensors = [
        wide.to(memory_format=torch.channels_last), wide[:, ::2].bfloat16(), wide.double()[0, 0].t(),
        wide[:, ::2],
    ]  # fmt: skip
    assert not tensors[3].is_contiguous()
    with fastreg.use_backend(name):
        value = penalty(tensors, absolute)
        gradients = penalty_gradients(torch.ones(()), tensors, absolute)
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(exact(tensors, absolute), rel=3e-7)
    for gradient, tensor, slope in zip(gradients, tensors, slopes(tensors, absolute), strict=True):
        assert gradient.dtype == tensor.dtype and torch.equal(gradient.double(), slope)
    assert gradients[0].stride() == tensors[0].stride()


@pytest.mark.parametrize("absolute", [False, True])
def test_is_deterministic(absolute):
    with fastreg.use_backend("triton"):
        first, second = (penalty(draw(), absolute) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in Triton's interpreter
def test_what_is_not_finite_shows(backend, bad, absolute):
    tensors = draw()
    tensors[3][17] = bad
    value = float(penalty(tensors, absolute))
    assert math.isnan(value) if math.isnan(bad) else value == math.inf


def test_large_weights_of_float16_do_not_overflow(backend):
    assert float(penalty([torch.full((1000,), 60000.0, dtype=torch.float16)], False)) == pytest.approx(
        1000 * float(torch.tensor(60000.0).half()) ** 2, rel=1e-6
    )


def test_a_table_is_kept_for_the_same_tensors():
    tensors = draw()
    first, second = (_batch(L2, tensors, tensors, []).table for _ in range(2))
    assert first is second
    assert _batch(L1, tensors, tensors, []).table is not first
    assert _batch(L2, tensors[:2], tensors[:2], []).table is not first


@pytest.mark.parametrize("absolute", [False, True])
def test_operators(absolute):
    tensors = [torch.randn(3, 4), torch.randn(5).bfloat16()]
    torch.library.opcheck(penalty, (tensors, absolute))
    torch.library.opcheck(penalty_gradients, (torch.tensor(2.0), tensors, absolute))
