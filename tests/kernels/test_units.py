"""Units of a parameter, and clipping by them: against the paper written down, in any memory layout."""

import math

import pytest
import torch
from torch.nn import Parameter

import fastreg
from fastreg import AdaptiveClip, ClipNorm

BACKENDS = ["reference", "compiled", "triton"]
SHAPES = [(7, 33), (64, 1040), (4, 3, 5, 5), (9,), (), (0,), (0, 4), (1, 6), (5000,), (3, 1), (301, 3)]
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "misaligned": lambda t: torch.cat((torch.zeros(1, dtype=t.dtype), t.flatten()))[1:].view(t.shape),
}


def draw(seed, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES]


def clipped(weight, gradient, clipping, eps=1e-3):
    """The paper, unit by unit."""
    if weight.dim() < 2:
        rows = [(weight, gradient)]
    else:
        rows = list(zip(weight, gradient, strict=True))
    out = []
    for w, g in rows:
        largest = clipping * max(float(w.double().norm()), eps)
        norm = float(g.double().norm())
        out.append(g * (largest / norm) if norm > largest else g)
    return torch.stack(out) if weight.dim() >= 2 and rows else out[0] if rows else gradient


@pytest.mark.slow(backend="triton", layout=("transposed", "channels last"))
@pytest.mark.slow(backend="triton", dtype=torch.float64)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_clips_by_unit(backend, layout, dtype, close):
    weights, gradients = draw(0, dtype=dtype), draw(1, 0.02, dtype)
    gradients[0][2], weights[1][3] = 0.0, 0.0
    params = [Parameter(LAYOUTS[layout](w.clone())) for w in weights]
    expected = [w - clipped(w, g, 0.02) for w, g in zip(weights, gradients, strict=True)]
    for p, g in zip(params, gradients, strict=True):
        p.grad = LAYOUTS[layout](g)
    with fastreg.use_backend(backend):
        fastreg.SGD(params, lr=1.0, regularizers=[AdaptiveClip(0.02)]).step()
    close([p.detach() for p in params], expected)
    moved = [(w - e) / g for w, e, g in zip(weights, expected, gradients, strict=True) if g.dim() == 2]
    shares = torch.cat([m[m.isfinite()].flatten() for m in moved])
    assert (shares < 0.9).any() and (shares > 0.999).any(), "some units are clipped, some are not"


@pytest.mark.parametrize("backend", BACKENDS)
def test_after_clipping_the_norm(backend, close):
    """Units are measured on what `ClipNorm` leaves of the gradient."""
    weights, gradients = draw(0), draw(1)
    params = [Parameter(w.clone()) for w in weights]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    factor = min(1.0, 3.0 / (float(torch.nn.utils.get_total_norm(gradients)) + 1e-6))
    with fastreg.use_backend(backend):
        fastreg.SGD(params, lr=1.0, regularizers=[AdaptiveClip(0.02), ClipNorm(3.0)]).step()
    close(
        [p.detach() for p in params],
        [w - clipped(w, factor * g, 0.02) for w, g in zip(weights, gradients, strict=True)],
    )


@pytest.mark.slow(backend="triton")
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_steps_beside_other_components(backend, close):
    results = []
    for ours in (True, False):
        params = [Parameter(w) for w in draw(0)]
        make = fastreg.AdamW if ours else torch.optim.AdamW
        options = {"regularizers": [AdaptiveClip(0.05), fastreg.EMA(0.9)]} if ours else {}
        optimizer = make(params, lr=1e-2, weight_decay=0.1, **options)
        with fastreg.use_backend(backend):
            for turn in range(3):
                for p, g in zip(params, draw(turn + 1), strict=True):
                    p.grad = g if ours else clipped(p.detach(), g, 0.05)
                optimizer.step()
        results.append([p.detach() for p in params])
    close(*results)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_stays_in_its_unit(backend):
    weight = Parameter(torch.ones(3, 40))
    weight.grad = torch.full((3, 40), 1e-3)
    weight.grad[1, 5] = math.nan
    with fastreg.use_backend(backend):
        fastreg.SGD([weight], lr=1.0, regularizers=[AdaptiveClip(0.5)]).step()
    assert weight[1].isnan().all() and weight[[0, 2]].isfinite().all()


@pytest.mark.slow(dtype=torch.float16)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_narrow_weights(dtype):
    """Sums of squares are taken in float32, the factor is that of the wide weights."""
    results = []
    for name in BACKENDS:
        params = [Parameter(w) for w in draw(0, dtype=dtype)]
        for p, g in zip(params, draw(1, dtype=dtype), strict=True):
            p.grad = g
        with fastreg.use_backend(name):
            fastreg.SGD(params, lr=1.0, regularizers=[AdaptiveClip(0.02)], bf16="remainder").step()
        results.append([p.detach().float() for p in params])
    wide = [
        w.float() - clipped(w.float(), g.float(), 0.02)
        for w, g in zip(draw(0, dtype=dtype), draw(1, dtype=dtype), strict=True)
    ]
    for actual in results:
        for p, expected in zip(actual, wide, strict=True):
            assert ((p - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-6).all()
