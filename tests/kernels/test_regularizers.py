"""Regularizers: against compositions of torch's own parts, and the same bits on every backend."""

import math

import pytest
import torch

import fastreg

SHAPES = [(1,), (127,), (33, 65), (), (0,), (2 * 4096 + 17,)]
BACKENDS = ["reference", "compiled", "triton"]


def train(backend="reference", steps=10, dtype=torch.float32, make=fastreg.AdamW, **options):
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(shape, generator=generator) for shape in SHAPES]
    params = [torch.nn.Parameter((t + t.sign()).to(dtype)) for t in draw]
    optimizer = make(params, lr=1e-2, weight_decay=0.1, **options)
    with fastreg.use_backend(backend):
        for _ in range(steps):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            optimizer.step()
    return params, optimizer


class Composed(torch.optim.AdamW):
    """AdamW after `clip_grad_norm_`, followed by `_foreach_lerp_` into an average."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.params = params
        self.averages = [p.detach().clone() for p in params]

    @torch.no_grad()
    def step(self, closure=None):
        torch.nn.utils.clip_grad_norm_([p for p in self.params if p.numel()], 1.0)
        super().step()
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.params], 0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_and_average_equal_the_composition(backend, close):
    expected, baseline = train(make=Composed)
    params, optimizer = train(backend, regularizers=[fastreg.EMA(0.9), fastreg.ClipNorm(1.0)])
    close(params, expected)
    close([optimizer.state[p]["ema"] for p in params], baseline.averages)


@pytest.mark.parametrize("backend", ["compiled", "triton"])
@pytest.mark.parametrize("make", [fastreg.AdamW, fastreg.SGD, fastreg.Lion])
def test_backends_give_the_same_bits(make, backend, same):
    """With an infinite limit the factor is 1 on all: the norm itself is summed in another order."""

    def pieces():
        return [
            fastreg.ClipNorm(math.inf),
            fastreg.GradientNoise(0.1),
            fastreg.EMA(0.9),
            fastreg.EMA(0.5, "fast"),
        ]

    expected, baseline = train(make=make, regularizers=pieces(), seed=-1)
    params, optimizer = train(backend, make=make, regularizers=pieces(), seed=-1)
    for p, q in zip(params, expected, strict=True):
        assert same(p, q)
        assert all(same(optimizer.state[p][name], value) for name, value in baseline.state[q].items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_added_after_clipping(backend):
    """Zero gradients, plain descent: what comes out is the noise, whatever the limit of the clip."""
    params = [torch.nn.Parameter(torch.zeros(20000))]
    params[0].grad = torch.zeros(20000)
    pieces = [fastreg.GradientNoise(0.5), fastreg.ClipNorm(1e-3)]
    with fastreg.use_backend(backend):
        fastreg.SGD(params, lr=1.0, regularizers=pieces, seed=3).step()
    noise = params[0].detach() / 0.5
    assert noise.mean().abs() < 4 / 20000**0.5 and (noise.var() - 1).abs() < 4 * (2 / 20000) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["l2", "decoupled"])
def test_decay_kinds_of_sgd(backend, kind, close):
    """Plain descent with either kind is p ← p - lr (g + λp); with momentum, only l2 enters the buffer."""
    plain, _ = train(backend, make=fastreg.SGD, decay=kind)
    expected, _ = train(make=torch.optim.SGD)
    close(plain, expected)
    _, optimizer = train(backend, steps=1, make=fastreg.SGD, decay=kind, momentum=0.9)
    buffers = [optimizer.state[p]["momentum_buffer"] for p in optimizer.param_groups[0]["params"]]
    gradients = [p.grad for p in optimizer.param_groups[0]["params"]]
    assert all(map(torch.equal, buffers, gradients)) == (kind == "decoupled")


@pytest.mark.parametrize("backend", BACKENDS)
def test_average_of_narrow_weights_is_float32(backend):
    """The average follows the weight before it is rounded, and keeps what bfloat16 would lose."""
    params, optimizer = train(backend, steps=1, dtype=torch.bfloat16, regularizers=[fastreg.EMA(0.0)])
    for p in params:
        average = optimizer.state[p]["ema"]
        assert average.dtype == torch.float32
        assert ((average - p.float()).abs() <= torch.finfo(torch.bfloat16).eps * average.abs()).all()
        assert not p.numel() > 100 or not torch.equal(average, p.float())
