"""Plain storage: the weight is what the parameter holds and is rounded once, to nearest.

Other storages are toys of `test_step`, which proves that the template takes them.
"""

import pytest
import torch

import fastreg


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "compiled", "triton"])
def test_rounds_to_nearest(backend, dtype):
    p = torch.nn.Parameter(torch.linspace(-3, 3, 4099, dtype=torch.float64).to(dtype))
    p.grad = torch.linspace(1, 2, 4099, dtype=torch.float64).to(dtype) / 3
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (p.detach().to(compute) - p.grad.to(compute)).to(dtype)
    with fastreg.use_backend(backend):
        fastreg.SGD([p], lr=1.0, bf16="nearest").step()
    assert torch.equal(p.detach(), expected)


@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_rounds_bfloat16_to_nearest(backend):
    """Not in Triton's interpreter, which truncates."""
    p = torch.nn.Parameter(torch.linspace(-3, 3, 4099).bfloat16())
    p.grad = torch.linspace(1, 2, 4099).bfloat16() / 3
    expected = (p.detach().float() - p.grad.float()).bfloat16()
    with fastreg.use_backend(backend):
        fastreg.SGD([p], lr=1.0, bf16="nearest").step()
    assert torch.equal(p.detach(), expected)
