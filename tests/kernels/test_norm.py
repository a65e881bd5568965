"""The global norm and its clip factor: kernel against reference against float64."""

import math

import pytest
import torch

import fastreg

SIZES = [(1,), (5, 7), (0,), (4096,), (3 * 4096 + 13,), (130, 33)]


def measure(gradients, backend, max_norm=1.0):
    """The norm that the engine reports and how much of the gradient a plain step takes."""
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    optimizer = fastreg.SGD(params, lr=1.0, regularizers=[fastreg.ClipNorm(max_norm)])
    with fastreg.use_backend(backend):
        optimizer.step()
    return optimizer.grad_norm, [-p.detach() for p in params]


def draw(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return [(scale * torch.randn(size, generator=generator)).to(dtype) for size in SIZES]


@pytest.mark.slow(backend="compiled", dtype=torch.float16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "compiled", "triton"])
def test_norm_is_that_of_float64(backend, dtype):
    gradients = draw(dtype)
    exact = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
    theirs = torch.nn.utils.get_total_norm([g.float() for g in gradients]).item()
    norm, _ = measure(gradients, backend)
    allowed = 0 if backend == "triton" else 2 * abs(theirs - exact)
    assert abs(norm.item() - exact) <= allowed + 2e-7 * exact


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6, math.inf])
@pytest.mark.parametrize("backend", ["reference", "compiled", "triton"])
def test_clips_as_torch_does(backend, max_norm):
    gradients = draw()
    clones = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(clones, gradients, strict=True):
        p.grad = g.clone()
    expected_norm = torch.nn.utils.clip_grad_norm_(clones, max_norm)
    norm, steps = measure(gradients, backend, max_norm)
    assert abs(norm.item() - expected_norm.item()) <= 1e-6 * expected_norm.item()
    for step, p in zip(steps, clones, strict=True):
        assert torch.allclose(step, p.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_misaligned_gradients(backend):
    """Views into a bucket start anywhere; the kernel then reads element by element."""
    bucket = torch.randn(3 * 5000 + 3, generator=torch.Generator().manual_seed(2))
    gradients = [bucket[1 + 5000 * i : 5001 + 5000 * i] for i in range(3)]
    norm, _ = measure(gradients, backend)
    assert abs(norm.item() - bucket[1:15001].double().norm().item()) <= 2e-7 * norm.item()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("backend", ["reference", "compiled", "triton"])
def test_what_is_not_finite_shows(backend, bad):
    gradients = draw()
    gradients[3][17] = bad
    norm, steps = measure(gradients, backend)
    assert math.isnan(norm.item()) if math.isnan(bad) else norm.item() == math.inf
    expected = [g * (math.nan if math.isnan(bad) else 0.0) for g in gradients]
    assert all(torch.equal(s.isnan(), e.isnan()) for s, e in zip(steps, expected, strict=True))


def test_is_deterministic_and_independent_of_batches():
    gradients = draw()
    first, second = (measure(gradients, "triton")[0] for _ in range(2))
    assert torch.equal(first, second)
    mixed = [g.double() if i % 2 else g for i, g in enumerate(gradients)]
    assert abs(measure(mixed, "triton")[0].item() - first.item()) <= 1e-7 * first.item()
