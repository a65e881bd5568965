"""On a GPU with tensors that live there: what the interpreter cannot show."""

import pytest
import torch

import fastreg

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
EVERYTHING = (fastreg.ClipNorm(1.0), fastreg.GradientNoise(0.01), fastreg.EMA(0.9))


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1,), (127,), (33, 65), (), (0,), (2 * 4096 + 17,)] * 3
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator).to("cuda", dtype)) for shape in shapes]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator).to("cuda", dtype)
    return made


def test_equals_the_oracle(rule, close):
    ours, theirs = parameters(), parameters()
    optimizer, oracle = rule(ours), rule.oracle(theirs)
    for _ in range(5):
        optimizer.step()
        oracle.step()
    close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights_are_rounded_once(dtype):
    ours, wide = parameters(dtype), parameters(dtype)
    wide = [torch.nn.Parameter(p.float()) for p in wide]
    for p, q in zip(ours, wide, strict=True):
        q.grad = p.grad.float()
    fastreg.AdamW(ours, lr=1e-2, bf16="nearest").step()
    torch.optim.AdamW(wide, lr=1e-2).step()
    for p, q in zip(ours, wide, strict=True):
        ulp = torch.finfo(dtype).eps * q.abs()
        assert ((p.float() - q).abs() <= 0.5 * ulp + 1e-6 * q.abs()).all()


def test_no_step_waits_for_the_device():
    params = parameters()
    optimizer = fastreg.AdamW(params, regularizers=EVERYTHING)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            for p in params:
                p.grad = p.grad.clone()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_skipped_step_waits_for_nobody_and_leaves_no_trace():
    """Neither the step nor the next one synchronizes; the count is right when it is read."""
    params = parameters()
    optimizer = fastreg.AdamW(params, regularizers=EVERYTHING, nonfinite="skip")
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        params[0].grad = torch.full_like(params[0].grad, float("nan"))
        before = [p.detach().clone() for p in params]
        optimizer.step()
        params[0].grad = torch.zeros_like(params[0])
        after = [p.detach().clone() for p in params]
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, before, after))
    assert {float(state["step"]) for state in optimizer.state_dict()["state"].values()} == {2.0}


def test_cuda_graph(close):
    """A captured step counts on the device and follows a learning rate that lies there."""
    ours, theirs = parameters(), parameters()
    rate = torch.tensor(0.1, device=ours[0].device)
    optimizer = fastreg.AdamW(ours, lr=rate, capturable=True, regularizers=[fastreg.ClipNorm(1.0)])
    oracle = torch.optim.AdamW(theirs, lr=0.1)

    def plain():
        for p, q in zip(theirs, ours, strict=True):
            p.grad = q.grad.clone()
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        oracle.param_groups[0]["lr"] = float(rate)
        oracle.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        plain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for turn in range(3):
        rate.fill_(0.1 / (turn + 1))
        for p in ours:
            p.grad.mul_(-1.5)
        graph.replay()
        plain()
    torch.cuda.synchronize()
    close(ours, theirs)
    assert optimizer.state[ours[0]]["step"] == 6


def test_grad_scaler_on_the_device(close):
    ours, theirs = parameters(), parameters()
    optimizer = fastreg.AdamW(ours, lr=0.1, regularizers=[fastreg.ClipNorm(1.0)])
    oracle, scaler = torch.optim.AdamW(theirs, lr=0.1), torch.amp.GradScaler("cuda", init_scale=1024.0)
    for turn in range(3):
        scaler.scale(torch.ones((), device="cuda"))
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad * scaler.get_scale()
        if turn == 1:
            ours[0].grad.fill_(float("inf"))
        else:
            torch.nn.utils.clip_grad_norm_(theirs, 1.0)
            oracle.step()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0
    close(ours, theirs)
    assert {float(state["step"]) for state in optimizer.state_dict()["state"].values()} == {2.0}


def test_on_another_stream():
    """Uploads and kernels follow the current stream; host buffers are not reused before they are read."""
    ours, theirs = parameters(), parameters()
    optimizer, oracle = fastreg.AdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        for turn in range(20):
            optimizer.param_groups[0]["lr"] = 1e-2 / (turn + 1)
            optimizer.step()
    for turn in range(20):
        oracle.param_groups[0]["lr"] = 1e-2 / (turn + 1)
        oracle.step()
    torch.cuda.synchronize()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-6 * float(q.abs().max()) if q.numel() else 0)


def test_resumes_bit_for_bit():
    ours, again = parameters(), parameters()
    first = fastreg.AdamW(ours, regularizers=EVERYTHING, seed=1)
    first.step()
    with torch.no_grad():
        for p, q in zip(ours, again, strict=True):
            q.copy_(p)
    second = fastreg.AdamW(again, regularizers=EVERYTHING)
    second.load_state_dict(first.state_dict())
    first.step()
    second.step()
    assert all(map(torch.equal, ours, again))
