"""Dropout and what is fused around it: the kernels against the reference, over several blocks."""

import math

import pytest
import torch

import fastreg
from fastreg.nn import rates
from fastreg.ops import _elementwise as elementwise
from fastreg.ops import dropout as dropout_ops
from fastreg.reference.activations import ACTIVATIONS
from fastreg.runtime.launch_parameters import LaunchParameters, trying

COLUMNS = [768, 1031]  # loaded eight at a time, and not
SEED = torch.tensor(2**40 + 3)


@pytest.fixture(autouse=True)
def small_blocks():
    """So that few elements take several programs, each of several rounds of the wide loop."""
    with trying("dropout", LaunchParameters(4096, per_thread=8)):
        yield


def draw(shape, dtype=torch.float64, seed=0, spread=2.0):
    made = spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype)


def run(kind, a, b, bias, drop_thresholds, activation, dtype, backend="triton", inner=1, out=None):
    x, residual, gradient = (a, b, None) if kind == "dropout" else (b, None, a)
    with fastreg.use_backend(backend):
        elements, shared = (x, residual, gradient), (bias, drop_thresholds)
        return elementwise.run(dropout_ops.DROPOUT, elements, shared, SEED, inner, (activation,), dtype, out)


def compare(kind, a, b, bias, drop_thresholds, activation, dtype, inner=1):
    """The mask of the reference, and at most twice its distance from float64, besides rounding."""
    actual = run(kind, a, b, bias, drop_thresholds, activation, dtype, inner=inner)
    plain = run(kind, a, b, bias, drop_thresholds, activation, dtype, "reference", inner)
    wide = [None if t is None else t.double() for t in (a, b, bias)]
    truth = run(kind, *wide, drop_thresholds, activation, torch.float64, "reference", inner)
    assert actual.dtype == dtype and actual.shape == truth.shape and truth.isfinite().all()
    error, other = ((t.double() - truth).abs() for t in (actual, plain))
    # The interpreter truncates to bfloat16: a whole unit in the last place.
    storage = torch.finfo(dtype).eps * truth.abs()
    compute = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * truth.abs().max()
    assert (error <= 2 * other.max() + storage + compute).all()
    with fastreg.use_backend("reference"):
        dropped = dropout_ops.dropout(torch.ones_like(truth), SEED, drop_thresholds, inner, None) == 0
    expected = torch.zeros_like(actual) if kind != "dropout" or b is None else b.to(dtype)
    assert torch.equal(actual[dropped], expected[dropped])


DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
ALL_ACTIVATIONS = pytest.mark.parametrize("activation", ACTIVATIONS)
WIDTHS = pytest.mark.parametrize("columns", COLUMNS)
REAL = pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "identity"])


@DTYPES
@ALL_ACTIVATIONS
@WIDTHS
def test_forward(activation, dtype, columns):
    x, residual = draw((13, columns), dtype, 0), draw((13, columns), dtype, 1)
    compare("dropout", x, residual, draw(columns, dtype, 2), rates.drop_thresholds(0.3), activation, dtype)


@DTYPES
@REAL
@WIDTHS
def test_backward(activation, dtype, columns):
    g, x = draw((13, columns), dtype, 0), draw((13, columns), dtype, 1)
    compare("dropout_backward", g, x, draw(columns, dtype, 2), rates.drop_thresholds(0.3), activation, dtype)


@pytest.mark.parametrize("bias, residual", [(False, False), (False, True), (True, False)])
def test_without_a_part(bias, residual):
    x, other, vector = draw((13, 768)).float(), draw((13, 768), seed=1).float(), draw(768, seed=2).float()
    tensors = x, other if residual else None, vector if bias else None
    compare("dropout", *tensors, rates.drop_thresholds(0.3), "gelu", torch.float32)
    compare("dropout_backward", other, x, tensors[2], rates.drop_thresholds(0.3), "gelu", torch.float32)


@WIDTHS
def test_a_rate_for_each_feature(columns):
    x, residual, bias = draw((13, columns)).float(), draw((13, columns)).float(), draw(columns).float()
    drop_thresholds = rates.drop_thresholds(torch.linspace(0, 1, columns))
    compare("dropout", x, residual, bias, drop_thresholds, "silu", torch.float32)
    compare("dropout_backward", x, residual, bias, drop_thresholds, "silu", torch.float32)


@pytest.mark.parametrize("inner", [3, 8, 1000, 2**30])
def test_channels_of_several_elements(inner):
    """Of 2³⁰ the index of a channel takes 64 bits."""
    drop_thresholds = rates.drop_thresholds([0.1, 0.9, 0.0, 1.0, 0.5])
    compare("dropout", draw(13_001).float(), None, None, drop_thresholds, "identity", torch.float32, inner)


@pytest.mark.parametrize("x, bias, residual", [
    (torch.bfloat16, torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float32, None), (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32, torch.float64),
], ids=str)  # fmt: skip
def test_mixed_dtypes(x, bias, residual):
    result = x if residual is None else torch.promote_types(x, residual)
    rest = None if residual is None else draw((7, 768), residual, 1)
    drop_thresholds = rates.drop_thresholds(0.3)
    compare("dropout", draw((7, 768), x), rest, draw(768, bias, 2), drop_thresholds, "gelu", result)
    gradient = draw((7, 768), result, 3)
    compare("dropout_backward", gradient, draw((7, 768), x), draw(768, bias, 2), drop_thresholds, "gelu", x)


@pytest.mark.parametrize("size", [*range(1, 18), 4095, 4096, 4097, 8191])
def test_sizes(size):
    x = draw(size).float()
    bias = draw(size, seed=1).float()
    compare("dropout", x, x, bias, rates.drop_thresholds(0.5), "relu", torch.float32)
    compare("dropout_backward", x, x, bias, rates.drop_thresholds(0.5), "relu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip", [1, 3, 4])
def test_starts_amid_an_allocation(skip, dtype):
    """Not at a multiple of 16 bytes: x, residual, bias, and the result."""
    x, residual, bias = (draw(6000, dtype, seed)[skip:] for seed in range(3))
    compare("dropout", x, residual, bias, rates.drop_thresholds(0.3), "gelu_tanh", dtype)
    compare("dropout_backward", x, residual, bias, rates.drop_thresholds(0.3), "gelu_tanh", dtype)
    aligned = run("dropout", x.clone(), None, None, rates.drop_thresholds(0.3), "identity", dtype)
    storage = draw(6000, dtype)
    part = storage[skip:]
    run("dropout", part, None, None, rates.drop_thresholds(0.3), "identity", dtype, out=part)
    assert torch.equal(storage[skip:], aligned) and torch.equal(storage[:skip], draw(6000, dtype)[:skip])


@REAL
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
def test_what_is_dropped_is_0_whatever_it_was(activation):
    """In a block where some stay, and where none does, which is not even read."""
    bad = torch.tensor([math.inf, -math.inf, math.nan]).repeat(3000)
    with fastreg.use_backend("reference"):
        kept = dropout_ops.dropout(torch.ones_like(bad), SEED, rates.drop_thresholds(0.5), 1, None) != 0
    for p, stays in ((0.5, kept), (1.0, kept & False)):
        drop_thresholds = rates.drop_thresholds(p)
        y = run("dropout", bad, None, None, drop_thresholds, activation, torch.float32)
        g = run("dropout_backward", bad, bad, None, drop_thresholds, activation, torch.float32)
        assert not y[~stays].any() and not g[~stays].any()
        residual = torch.ones_like(bad)
        y = run("dropout", bad, residual, None, drop_thresholds, activation, torch.float32)
        assert torch.equal(y[~stays], residual[~stays])


def test_nothing_is_done_for_no_elements():
    empty = torch.empty(0, 768)
    y = run("dropout", empty, empty, torch.ones(768), rates.drop_thresholds(0.5), "gelu", torch.float32)
    assert y.shape == (0, 768)
