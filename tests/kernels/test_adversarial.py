"""Steps of adversarial inputs: the kernels against the reference, bit for bit, over several programs."""

import math
import os

import pytest
import torch

import fastreg
from fastreg.ops import adversarial as adversarial_ops
from fastreg.reference import adversarial as reference
from fastreg.reference import random
from fastreg.reference.random import PhiloxPosition
from fastreg.reference.step import compute_dtype
from fastreg.runtime.launch_parameters import LaunchParameters, trying

ALL_DTYPES = torch.float32, torch.bfloat16, torch.float64, torch.float16
DTYPES = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=lambda d: str(d)[6:])
# A program, several, one with both ends narrow, less than a wide access, one element.
SHAPES = [(3, 1500), (2, 37), (2, 16), (4, 1)]


@pytest.fixture(autouse=True)
def small_blocks():
    """So that few elements take several programs, each of several rounds of the wide loop."""
    few = LaunchParameters(1024, per_thread=4)
    with trying("adversarial_step", few), trying("adversarial_norm", few):
        yield


def limits(kind, dtype):
    if kind == "none":
        return None
    if kind == "scalar":
        return adversarial_ops.Bounds(torch.tensor(0.25, dtype=dtype), torch.tensor(0.75, dtype=dtype), 1)
    lower = torch.tensor([0.0, 0.125, 0.25], dtype=dtype)
    return adversarial_ops.Bounds(lower, lower + 0.5, 4)


def step_inputs(kind, dtype, shape, at_clean=False, skip=0):
    """Inputs off their clean ones, and gradients with NaN and infinity."""
    generator = torch.Generator().manual_seed(0)

    def draw(dtype=dtype):
        store = torch.randn(shape[0] * shape[1] + skip, generator=generator, dtype=torch.float64)
        return store.to(dtype)[skip:].view(shape)

    clean = draw().sigmoid()
    x = clean if at_clean else clean.to(compute_dtype(dtype)) + 0.1 * draw(compute_dtype(dtype))
    gradient = draw()
    for first, value in enumerate((math.nan, math.inf, -math.inf, 0.0)):
        gradient.view(-1)[first::11] = value
    step_scalars = torch.rand(shape[0], 3, generator=generator, dtype=compute_dtype(dtype)) / 8
    peaks = torch.randint(shape[1], shape[:1], generator=generator)
    with_gradient = kind not in (*reference.NOISES, "none")
    return adversarial_ops.StepInputs(
        x, gradient if with_gradient else None, None if at_clean else clean, step_scalars, kind,
        peaks if kind == "peak" else None, torch.tensor(2**40 + 3) if kind in reference.NOISES else None,
    )  # fmt: skip


def on(backend, run, *arguments):
    with fastreg.use_backend(backend):
        return run(*arguments)


def compare(same, inputs, ball, bounds, dtype):
    actual, expected = (
        on(name, adversarial_ops.move, inputs, ball, bounds, dtype) for name in ("triton", "reference")
    )
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and b.isfinite().all()
        assert same(a, b) or within_a_unit(a, b)


def within_a_unit(a, b):
    """Fused multiply-adds may round to the other neighbouring 16-bit number."""
    fused = os.environ.get("FASTREG_TEST_DEVICE", "cpu") != "cpu" and a.dtype.itemsize == 2
    return fused and bool(
        ((a.double() - b.double()).abs() <= torch.finfo(a.dtype).eps * b.double().abs()).all()
    )


STEPS = [
    ("sign", "none", "scalar"), ("sign", "linf", "table"), ("scaled", "l2", "scalar"), ("none", "l1", "none"),
    ("peak", "none", "table"), ("uniform", "none", "scalar"), ("normal", "none", "none"),
    ("laplace", "none", "none"),
]  # fmt: skip


@pytest.mark.parametrize(
    "kind, ball, bounds, dtype",
    [
        pytest.param(
            *step, dtype, id="-".join((*step, str(dtype)[6:])),
            marks=[pytest.mark.slow] * (step[0] in reference.NOISES and dtype in ALL_DTYPES[2:]),
        )
        for step in STEPS
        for dtype in ALL_DTYPES
    ],
)  # fmt: skip
def test_steps(same, kind, ball, bounds, dtype):
    for shape in SHAPES:
        compare(same, step_inputs(kind, dtype, shape), ball, limits(bounds, dtype), dtype)


@DTYPES
def test_steps_from_the_clean_input(same, dtype):
    for kind in ("sign", "scaled"):
        compare(
            same, step_inputs(kind, dtype, (3, 1500), at_clean=True), "none", limits("scalar", dtype), dtype
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_misaligned(same, dtype):
    """Views into an allocation, one element off."""
    compare(same, step_inputs("sign", dtype, (3, 700), skip=1), "linf", limits("scalar", dtype), dtype)


def test_one_row_of_numbers_for_all(same):
    inputs = step_inputs("sign", torch.float32, (3, 700))
    compare(
        same, inputs._replace(step_scalars=inputs.step_scalars[:1].contiguous()), "linf", None, torch.float32
    )


@DTYPES
@pytest.mark.parametrize(
    "kind, order, moved",
    [
        ("scaled", 1, False),
        ("scaled", 2, False),
        ("scaled", 2, True),
        ("normal", 2, False),
        ("laplace", 1, False),
    ],
)
def test_norms(kind, order, moved, dtype):
    for shape in ((3, 1500), (2, 37), (4, 1)):
        inputs = step_inputs(kind, dtype, shape)
        if not moved:
            inputs = inputs._replace(clean=None, x=torch.zeros(shape, dtype=dtype), step_scalars=None)
        actual, expected = (
            on(name, adversarial_ops.norms, inputs, order) for name in ("triton", "reference")
        )
        assert actual.shape == (shape[0], 1) and actual.dtype == expected.dtype == compute_dtype(dtype)
        bound = 1e-12 if dtype == torch.float64 and kind == "scaled" else 1e-6
        torch.testing.assert_close(actual, expected, rtol=bound, atol=0)


@pytest.mark.parametrize(
    "dtype, kind, ball", [(torch.bfloat16, "sign", "linf"), (torch.float16, "scaled", "l2")]
)
def test_compiled_equals_the_reference(dtype, kind, ball):
    """Inductor keeps what has 16 bits in 32: rounding must not be lost."""
    inputs = step_inputs(kind, dtype, (5, 737))
    actual, expected = (
        on(name, adversarial_ops.move, inputs, ball, limits("table", dtype), dtype)
        for name in ("compiled", "reference")
    )
    assert all(map(torch.equal, actual, expected))


# The reference against definitions ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_towards_the_clean_input(dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = [10.0**k for k in (-12, -8, -7, -6, -5, -3, 0, 3, 5)]
    y = torch.cat([torch.randn(10_000, generator=generator) * size for size in sizes])
    y = torch.cat([y, torch.tensor([0.0, -0.0, 65510.0, -65510.0, 65535.0, 1e-45, 3.4e38, -3.4e38])])
    clean = (y * (1 + 0.3 * torch.randn(y.shape, generator=generator))).to(dtype)
    clean[::7] *= -1
    rounded = reference.towards(y, clean.float(), dtype)
    low, high = (torch.where(clean.float() > y, *pair) for pair in ((y, clean.float()), (clean.float(), y)))
    assert ((rounded.double() >= low.double()) & (rounded.double() <= high.double())).all()
    units = rounded.view(torch.int16).int() - y.to(dtype).view(torch.int16).int()
    assert (units.abs() <= 1).all()


def test_threshold_is_that_of_the_nearest_point_of_the_ball():
    """Against bisection of Σ max(|y| - θ, 0) = radius in float64."""
    size = torch.randn(6, 301, generator=torch.Generator().manual_seed(0), dtype=torch.float64).abs()
    size[1] = 0
    size[2, :] = 1.0  # all equal
    size[3] = size[3].round()  # many equal
    radius = torch.tensor([[5.0], [1.0], [2.0], [0.0], [1e6], [0.5]], dtype=torch.float64)
    low, high = torch.zeros_like(radius), size.amax(1, keepdim=True)
    for _ in range(200):
        middle = (low + high) / 2
        above = (size - middle).clamp(min=0).sum(1, keepdim=True) > radius
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    torch.testing.assert_close(reference.threshold(size, radius), high, rtol=1e-9, atol=1e-12)


def test_laplace_noise_is_of_its_distribution():
    """Moments of scale 2, within five standard errors; neither sign is preferred."""
    n = 2**20
    z = random.laplace(torch.tensor(7), PhiloxPosition(0, 0, 0, 0), torch.empty(n)).double()
    assert abs(z.mean()) < 5 * math.sqrt(8 / n)
    assert abs(z.abs().mean() - 2) < 5 * 2 / math.sqrt(n)
    assert abs(z.square().mean() - 8) < 5 * math.sqrt((24 * 16 - 64) / n)
    assert abs(int((z > 0).sum()) - n / 2) < 5 * math.sqrt(n) / 2
    # Sign and size are of one word.
    assert abs((z.sign() * (z.abs() > 2 * math.log(2))).sum()) < 5 * math.sqrt(n / 2)
