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


@pytest.mark.slow(make=(fastreg.SGD, fastreg.Lion))
@pytest.mark.parametrize("backend", ["compiled", "triton"])
@pytest.mark.parametrize("make", [fastreg.AdamW, fastreg.SGD, fastreg.Lion])
def test_backends_give_the_same_bits(make, backend, same):
    """With an infinite limit the factor is 1 on all: the norm itself is summed in another order."""

    def components():
        return [
            fastreg.ClipNorm(math.inf),
            fastreg.GradientNoise(0.1),
            fastreg.EMA(0.9),
            fastreg.EMA(0.5, "fast"),
        ]

    expected, baseline = train(make=make, regularizers=components(), seed=-1)
    params, optimizer = train(backend, make=make, regularizers=components(), seed=-1)
    for p, q in zip(params, expected, strict=True):
        assert same(p, q)
        assert all(same(optimizer.state[p][name], value) for name, value in baseline.state[q].items())


@pytest.mark.slow(backend="compiled")
@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_added_after_clipping(backend):
    """Zero gradients, plain descent: what comes out is the noise, whatever the limit of the clip."""
    params = [torch.nn.Parameter(torch.zeros(20000))]
    params[0].grad = torch.zeros(20000)
    components = [fastreg.GradientNoise(0.5), fastreg.ClipNorm(1e-3)]
    with fastreg.use_backend(backend):
        fastreg.SGD(params, lr=1.0, regularizers=components, seed=3).step()
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


REGULARIZERS = {
    "value": lambda: fastreg.ClipValue(0.5),
    "noise, annealed": lambda: fastreg.GradientNoise(0.3, gamma=0.55),
    "L2-SP": lambda: fastreg.L2SP(0.3),
    "L1": lambda: fastreg.L1(0.5),
    "largest": lambda: fastreg.ClipNorm(math.inf, math.inf),
}


@pytest.mark.slow(name="largest", backend="triton")
@pytest.mark.slow(name="noise, annealed", backend="compiled")
@pytest.mark.parametrize("backend", ["compiled", "triton"])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_every_regularizer_gives_the_same_bits(name, backend, same):
    expected, baseline = train(regularizers=[REGULARIZERS[name]()], seed=-1)
    params, optimizer = train(backend, regularizers=[REGULARIZERS[name]()], seed=-1)
    for p, q in zip(params, expected, strict=True):
        assert same(p, q)
        assert all(same(optimizer.state[p][name], value) for name, value in baseline.state[q].items())


def steps(make, backend, regularizers, gradients, weights, oracle, **options):
    """One plain descent by 1 of ours, and what the oracle makes of weight and gradient."""
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    optimizer = make(params, lr=1.0, regularizers=regularizers, **options)
    with fastreg.use_backend(backend):
        optimizer.step()
    return [p.detach() for p in params], [oracle(w, g) for w, g in zip(weights, gradients, strict=True)]


def draw(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_value_is_torchs(backend):
    gradients = draw(1)
    gradients[1][:3] = torch.tensor([math.inf, -math.inf, math.nan])
    actual, expected = steps(
        fastreg.SGD, backend, [fastreg.ClipValue(0.5)], gradients, draw(), lambda w, g: w - g.clamp(-0.5, 0.5)
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_largest_norm_is_torchs(backend, close):
    params, twins = ([torch.nn.Parameter(w) for w in draw()] for _ in range(2))
    for p, q, g in zip(params, twins, draw(1), strict=True):
        p.grad, q.grad = g, g.clone()
    optimizer = fastreg.SGD(params, lr=1.0, regularizers=[fastreg.ClipNorm(0.7, norm_type=math.inf)])
    norm = torch.nn.utils.clip_grad_norm_([q for q in twins if q.numel()], 0.7, math.inf)
    with fastreg.use_backend(backend):
        optimizer.step()
    torch.optim.SGD(twins, lr=1.0).step()
    assert float(optimizer.grad_norm) == float(norm)
    close(params, twins)


@pytest.mark.parametrize("backend", BACKENDS)
def test_l1_is_soft_thresholding(backend):
    actual, expected = steps(
        fastreg.SGD, backend, [fastreg.L1(0.4)], draw(1), draw(),
        lambda w, g: torch.nn.functional.softshrink(w - g, 0.4),
    )  # fmt: skip
    assert all(map(torch.equal, actual, expected))
    assert any((w == 0).any() for w in actual)


@pytest.mark.parametrize("is_target", (False, True))
@pytest.mark.parametrize("backend", BACKENDS)
def test_l2_sp_pulls_towards_its_point(backend, is_target, close):
    towards = [torch.full(shape, 0.25) for shape in SHAPES]
    params = [torch.nn.Parameter(w) for w in draw()]
    start = [p.detach().clone() for p in params] if not is_target else towards
    weights = [p.detach().clone() for p in params]
    optimizer = fastreg.SGD(params, lr=0.1, regularizers=[fastreg.L2SP(0.3, towards if is_target else None)])
    with fastreg.use_backend(backend):
        for turn in range(3):
            for i, (p, g) in enumerate(zip(params, draw(turn), strict=True)):
                p.grad = g
                weights[i] = weights[i] - 0.1 * (g + 0.3 * (weights[i] - start[i]))
            optimizer.step()
    close(params, weights)
    assert all(torch.equal(optimizer.state[p]["l2_sp_start"], s) for p, s in zip(params, start, strict=True))


def test_l2_sp_towards_what_does_not_fit():
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    for towards, number in (([torch.ones(3)], 1), ([torch.ones(2), torch.ones(2)], 0)):
        optimizer = fastreg.SGD(params, regularizers=[fastreg.L2SP(0.1, towards)])
        for p in params:
            p.grad = torch.ones_like(p)
        with pytest.raises(
            ValueError, match=f"towards must hold a tensor for each parameter.*number {number}"
        ):
            optimizer.step()
        assert all((p == 1).all() for p in params)


@pytest.mark.slow(backend="compiled")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", (math.inf, 0.5))
def test_relative_noise_is_a_share_of_the_norm(backend, clip):
    """After clipping: noise of all elements together is `std` times what the norm is then."""
    gradients = [torch.randn(200, 100, generator=torch.Generator().manual_seed(3)), torch.ones(5000)]
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    norm = float(torch.nn.utils.get_total_norm(gradients))
    components = [fastreg.ClipNorm(clip), fastreg.GradientNoise(0.1, relative=True)]
    with fastreg.use_backend(backend):
        fastreg.SGD(params, lr=1.0, regularizers=components, seed=0).step()
    factor = min(1.0, clip / norm)
    noise = torch.cat([(-p.detach() - factor * g).flatten() for p, g in zip(params, gradients, strict=True)])
    assert float(noise.norm()) == pytest.approx(0.1 * factor * norm, rel=0.02)


def test_noise_is_annealed():
    """σ² = std² / (1 + t)^γ."""
    params = [torch.nn.Parameter(torch.zeros(20000))]
    params[0].grad = torch.zeros(20000)
    optimizer = fastreg.SGD(params, lr=1.0, regularizers=[fastreg.GradientNoise(0.5, gamma=0.55)], seed=0)
    for step in range(1, 5):
        before = params[0].detach().clone()
        optimizer.step()
        assert float((params[0].detach() - before).std()) == pytest.approx(0.5 * step**-0.275, rel=0.03)


DECAYS = {
    "l2": lambda w, u, lr: w - lr * (u + 0.3 * w),
    "decoupled": lambda w, u, lr: w - lr * u - lr * 0.3 * w,
    "independent": lambda w, u, lr: w - lr * u - lr / 0.5 * 0.3 * w,
    "cautious": lambda w, u, lr: w - lr * u - lr * 0.3 * w * (u * w >= 0),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", DECAYS)
def test_decay_kinds_with_a_schedule(kind, backend, close):
    """Each written down for plain descent, with a learning rate that falls from its largest, 0.5."""
    params, weights = [torch.nn.Parameter(w) for w in draw()], draw()
    optimizer = fastreg.SGD(params, lr=0.5, weight_decay=0.3, decay=kind)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with fastreg.use_backend(backend):
        for turn in range(3):
            lr = 0.5 * 0.5**turn
            for i, (p, g) in enumerate(zip(params, draw(turn + 1), strict=True)):
                p.grad = g
                weights[i] = DECAYS[kind](weights[i], g, lr)
            optimizer.step()
            schedule.step()
    close(params, weights)


def test_independent_decay_knows_the_largest_rate_of_the_schedule():
    """OneCycleLR starts low and tells its largest in the group."""
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    optimizer = fastreg.AdamW([weight], lr=1e-3, weight_decay=0.1, decay="independent")
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    lr = optimizer.param_groups[0]["lr"]
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 1 - lr / 0.1 * 0.1))


def test_kinds_of_decay_by_group(close):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(4)]
    groups = [{"params": p, "decay": kind} for p, kind in zip(params, DECAYS, strict=True)]
    optimizer = fastreg.SGD(groups, lr=0.5, weight_decay=0.3)
    for p in params:
        p.grad = torch.full((3,), -1.0)
    optimizer.step()
    expected = [DECAYS[kind](torch.ones(3), torch.full((3,), -1.0), 0.5) for kind in DECAYS]
    close(params, expected)
