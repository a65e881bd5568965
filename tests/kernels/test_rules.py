"""Update rules (the table in `conftest.py`): against their oracles, all backends against the reference."""

from functools import partial

import pytest
import torch

import fastreg

SHAPES = [(1,), (127,), (1024,), (33, 65), (), (0,), (2 * 4096 + 17,), (3, 1, 5)]


def train(make, dtype, steps=20, backend="reference"):
    """Parameters and optimizer after some steps, by the dtype alone; weights start at 1 or more."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    params = [torch.nn.Parameter((t + t.sign()).to(dtype)) for t in draw]
    optimizer = make(params)
    with fastreg.use_backend(backend):
        for _ in range(steps):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            optimizer.step()
    return params, optimizer


def tensors(params, optimizer, names):
    return [p.detach() for p in params] + [optimizer.state[p][name] for p in params for name in names]


@pytest.mark.slow(backend="compiled", dtype=torch.float64)
@pytest.mark.slow(backend=("compiled", "triton"), steps=20)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [4, 20])
def test_equals_the_oracle(rule, backend, dtype, steps, close):
    expected, baseline = train(rule.oracle, dtype, steps)
    params, optimizer = train(rule, dtype, steps, backend)
    names = [name for name, value in baseline.state[expected[1]].items() if value is not None]
    close(tensors(params, optimizer, names), tensors(expected, baseline, names))


@pytest.mark.slow(steps=20)
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("name", ["compiled", "triton"])
def test_backends_give_the_same_bits(rule, name, steps, same):
    expected, baseline = train(rule, torch.float32, steps)
    params, optimizer = train(rule, torch.float32, steps, name)
    assert all(map(same, tensors(params, optimizer, ()), tensors(expected, baseline, ())))
    pairs = zip(params, expected, strict=True)
    states = [(optimizer.state[p], baseline.state[q]) for p, q in pairs]
    assert not {name for ours, theirs in states for name in theirs if not same(ours[name], theirs[name])}


@pytest.mark.slow(backend="compiled", dtype=torch.float16)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_storage_is_computed_in_float32(rule, backend, dtype):
    """One step is the float32 step rounded once; the interpreter truncates to bfloat16, hence a whole ulp."""
    params, _ = train(partial(rule, bf16="nearest"), dtype, steps=1, backend=backend)
    start, _ = train(rule, dtype, steps=0)
    wide = [torch.nn.Parameter(p.float()) for p in start]
    for p, stepped in zip(wide, params, strict=True):
        p.grad = stepped.grad.float()
    rule.oracle(wide).step()
    for p, expected in zip(params, wide, strict=True):
        ulp = torch.finfo(dtype).eps * expected.abs()
        share = 1.0 if (backend, dtype) == ("triton", torch.bfloat16) else 0.5
        assert ((p.float() - expected).abs() <= share * ulp + 1e-6 * expected.abs()).all()
