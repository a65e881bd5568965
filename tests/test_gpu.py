"""On a GPU: sizes and graphs that neither the interpreter nor compilation ahead of time can show."""

import pytest
import torch

import fastreg
from fastreg.ops.ghost import sample_sums
from fastreg.privacy.clipped_sums import clip_and_sum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = torch.device("cuda", 0)


def has_memory(gigabytes):
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] >= gigabytes * 2**30


def test_what_a_graph_uploads_serves_no_later_step():
    """A penalty whose first launch is inside a capture, then an eager step before any replay."""
    params = [torch.nn.Parameter(torch.randn(100, device=DEVICE))]
    value = torch.ones((), device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    torch.ops.fastreg.penalty_gradients(value, [torch.randn(3, device=DEVICE)], False)  # compiles the kernel
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = torch.ops.fastreg.penalty_gradients(value, params, False)
    (eager,) = torch.ops.fastreg.penalty_gradients(value, params, False)
    assert torch.allclose(eager, 2 * params[0].detach())
    params[0].grad = torch.ones_like(params[0])
    before = params[0].detach().clone()
    fastreg.SGD(params, lr=1.0).step()
    assert torch.allclose(params[0].detach(), before - 1)
    for _ in range(2):
        graph.replay()
    assert torch.allclose(captured[0], 2 * params[0].detach())


def test_penalties_under_reduce_overhead():
    params = [torch.nn.Parameter(torch.randn(64, 64, device=DEVICE)) for _ in range(3)]

    def loss(x):
        return (x @ params[0]).square().mean() + fastreg.l2_penalty(params, 0.1)

    compiled = torch.compile(loss, mode="reduce-overhead")
    x = torch.ones(64, 64, device=DEVICE)
    loss(x).backward()
    expected = [p.grad.clone() for p in params]
    for _ in range(4):
        for p in params:
            p.grad = None
        torch.compiler.cudagraph_mark_step_begin()
        compiled(x).backward()
        for p, gradient in zip(params, expected, strict=True):
            torch.testing.assert_close(p.grad, gradient)


def test_more_samples_than_the_second_dimension_of_a_grid_holds():
    samples = 65_537
    total = torch.zeros(8, device=DEVICE)
    result = clip_and_sum([torch.ones(samples, 8, device=DEVICE)], [total], [1.0])
    assert torch.allclose(result.norms, torch.full_like(result.norms, 8**0.5))
    assert torch.allclose(total, torch.full_like(total, samples / 8**0.5))


@pytest.mark.skipif(not has_memory(24), reason="needs 24 GiB")
def test_more_elements_than_32_bits_count():
    n = 2**31 + 48
    x = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
    y = fastreg.nn.Dropout(0.5)(x + 1)
    for part in (y[:1000], y[-1000:]):
        assert 0.3 < float((part == 0).float().mean()) < 0.7
    del y
    weight = torch.nn.Parameter(x)
    weight.grad = torch.ones_like(weight)
    optimizer = fastreg.SGD([weight], lr=1.0, regularizers=[fastreg.ClipNorm(1e9)])
    optimizer.step()
    assert float(weight.detach()[0]) == -1 == float(weight.detach()[-1])
    assert abs(float(optimizer.grad_norm) / n**0.5 - 1) < 1e-6


@pytest.mark.skipif(not has_memory(12), reason="needs 12 GiB")
def test_a_sample_of_logits_with_more_elements_than_32_bits_count():
    gradient = torch.zeros(1, 8400, 256_000, dtype=torch.bfloat16, device=DEVICE)
    gradient[0, -1, -1] = 1
    assert float(sample_sums(gradient)[1][0, -1]) == 1


def test_a_first_step_inside_a_capture_is_refused():
    weight = torch.nn.Parameter(torch.ones(10, device=DEVICE))
    weight.grad = torch.ones_like(weight)
    optimizer = fastreg.AdamW([weight], capturable=True)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(graph):
        optimizer.step()
