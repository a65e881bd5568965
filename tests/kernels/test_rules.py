"""Update rules: against torch.optim, and kernel and compiled form against the reference.

A new rule is one row of `RULES`.
"""

import pytest
import torch

import fastreg

SHAPES = [(1,), (127,), (1024,), (33, 65), (), (0,), (2 * 4096 + 17,), (3, 1, 5)]
BACKENDS = ["reference", "compiled", "triton"]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2, line by line."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - lr * decay).sub_(lr * (beta1 * m + (1 - beta1) * p.grad).sign())
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


def _lion(params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
    return Lion(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})


RULES = [
    pytest.param(fastreg.AdamW, torch.optim.AdamW, {}, id="AdamW"),
    pytest.param(
        fastreg.AdamW, torch.optim.AdamW, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3},
        id="AdamW-strong",
    ),  # fmt: skip
    pytest.param(fastreg.SGD, torch.optim.SGD, {"lr": 0.1}, id="SGD"),
    pytest.param(fastreg.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, id="SGD-momentum"),
    pytest.param(
        fastreg.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        id="SGD-nesterov-l2",
    ),  # fmt: skip
    pytest.param(
        fastreg.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}, id="SGD-dampening"
    ),
    pytest.param(fastreg.Lion, _lion, {"weight_decay": 0.1}, id="Lion"),
]  # fmt: skip


def train(make, options, dtype, steps=20, backend="reference"):
    """Parameters and optimizer after some steps of what depends on the dtype alone."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    params = [torch.nn.Parameter((t + t.sign()).to(dtype)) for t in draw]
    optimizer = make(params, **options)
    with fastreg.use_backend(backend):
        for _ in range(steps):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            optimizer.step()
    return params, optimizer


def tensors(params, optimizer, names):
    return [p.detach() for p in params] + [optimizer.state[p][name] for p in params for name in names]


def worst(ours, theirs):
    """max|Δ| / max|reference| over the tensors that have elements."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.numel()]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("ours", "theirs", "options"), RULES)
def test_equals_torch(ours, theirs, options, backend, dtype):
    expected, baseline = train(theirs, options, dtype)
    params, optimizer = train(ours, options, dtype, backend=backend)
    names = [name for name, value in baseline.state[expected[1]].items() if value is not None]
    assert worst(tensors(params, optimizer, names), tensors(expected, baseline, names)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("backend", ["compiled", "triton"])
@pytest.mark.parametrize(("ours", "theirs", "options"), RULES)
def test_backends_give_the_same_bits(ours, theirs, options, backend):
    expected, baseline = train(ours, options, torch.float32)
    params, optimizer = train(ours, options, torch.float32, backend=backend)
    names = list(baseline.state[expected[0]])
    pairs = zip(tensors(params, optimizer, names), tensors(expected, baseline, names), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("ours", "theirs", "options"), RULES)
def test_narrow_storage_is_computed_in_float32(ours, theirs, options, backend, dtype):
    """One step is the float32 step rounded once; the interpreter truncates to bfloat16, hence a whole ulp."""
    params, optimizer = train(ours, options, dtype, steps=1, backend=backend)
    wide = [torch.nn.Parameter(p.float()) for p in train(ours, options, dtype, steps=0)[0]]
    generator = torch.Generator().manual_seed(0)
    for p in wide:
        torch.randn(p.shape, generator=generator, dtype=torch.float64)
    for p in wide:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype).float()
    baseline = theirs(wide, **options)
    baseline.step()
    for p, expected in zip(params, wide, strict=True):
        ulp = torch.finfo(dtype).eps * expected.abs()
        share = 1.0 if (backend, dtype) == ("triton", torch.bfloat16) else 0.5
        assert ((p.float() - expected).abs() <= share * ulp + 1e-6 * expected.abs()).all()
