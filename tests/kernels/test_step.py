"""What the template kernel offers, each proven by a toy component on the three backends.

Later work adds stages and components; if one of these needs the template edited, the template was not closed.
"""

import pytest
import torch
import triton
import triton.language as tl

import fastreg
from fastreg.engine import launch
from fastreg.engine.batch import Batch
from fastreg.engine.stage import Buffer, Stage, Storage
from fastreg.optim.fused_optimizer import FusedOptimizer
from fastreg.optim.regularizers import GradientNoise
from fastreg.reference import random as reference_random
from fastreg_kernels import random as kernel_random

BACKENDS = ["reference", "compiled", "triton"]
SHAPES = [(1,), (7,), (33, 65), (4096 + 48,), (0,), (2 * 4096 + 17,)]


class Nothing(fastreg.Component):
    """The update rule that takes the gradient as it is."""

    phase = fastreg.Phase.RULE


class Toy(FusedOptimizer):
    """Gradient descent by 1 with the given components."""

    def __init__(self, params, *components, seed=0, **defaults):
        self._init_components(Nothing(), None, components, seed, "nearest", None, "propagate")
        super().__init__(params, defaults)


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return made


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastreg.use_backend(request.param):
        yield request.param


# Number rows: one launch, numbers of each tensor's own group and step ------------------------------------


@triton.jit
def scale(p, u, at, factor):
    return p, u * factor, ()


class Scale(fastreg.Component):
    """u ← group["factor"] · step · u."""

    phase = fastreg.Phase.RULE

    def stage(self, group):
        return Stage(scale, lambda p, u, at, factor: (p, u * factor, ()), step_scalars=1)

    def step_scalars(self, group, step):
        return (group["factor"] * step,)


def test_number_rows(backend):
    params = parameters()
    groups = [
        {"params": params[:2], "factor": 0.5},
        {"params": params[2:4], "factor": 3.0},
        {"params": params[4:]},
    ]
    optimizer = Toy(groups, Scale(), factor=-1.0)
    late, kept = params[3], params[3].grad
    late.grad = None
    start = [p.detach().clone() for p in params]
    optimizer.step()
    late.grad = kept
    optimizer.step()
    factors = [0.5 * 3] * 2 + [3.0 * 3, 3.0 * 1] + [-1.0 * 3] * 2
    for p, p0, factor in zip(params, start, factors, strict=True):
        torch.testing.assert_close(p.detach(), p0 - factor * p.grad, rtol=0, atol=1e-5)


# Weight source: SAM's restore reads a backup and writes the parameter ------------------------------------


@triton.jit
def read_backup(backup):
    return backup


class Restore(fastreg.Component):
    """The weight comes from a backup, whatever the parameter holds."""

    phase = fastreg.Phase.RULE

    def storage(self, group, dtype):
        return Storage(
            kernels=(read_backup, "storage.write_plain"),
            read=lambda backup: backup,
            sources=("backup",),
            buffers=(Buffer("backup", "compute", "parameter"),),
        )


def test_weight_source(backend):
    params = parameters()
    start = [p.detach().clone() for p in params]
    optimizer = Toy(params, Restore())
    optimizer.step()
    with torch.no_grad():
        for p in params:
            p.fill_(float("nan"))
    optimizer.step()
    for p, p0 in zip(params, start, strict=True):
        assert torch.equal(p.detach(), p0 - p.grad)
        assert torch.equal(optimizer.state[p]["backup"], p0)


# Skip flag: decided on the device ------------------------------------------------------------------------


class Skip(fastreg.Component):
    phase = fastreg.Phase.RULE

    def __init__(self, flag):
        self.flag = torch.tensor([flag], dtype=torch.float64)

    def skip(self, device):
        return self.flag


@pytest.mark.parametrize("flag", [0.0, 1.0, float("inf")])
def test_skip_flag(backend, flag):
    params = parameters()
    start = [p.detach().clone() for p in params]
    optimizer = Toy(params, Skip(flag), fastreg.EMA(0.9))
    optimizer.step()
    for p, p0 in zip(params, start, strict=True):
        assert torch.equal(p.detach(), p0 if flag else p0 - p.grad)
        assert torch.equal(optimizer.state[p]["ema"], p0) or not flag


# Device scalars: one for all, or one for each tensor -----------------------------------------------------


@triton.jit
def two_scalars(p, u, at, shared, scales):
    return p, u * shared * scales, ()


class TrustRatio(fastreg.Component):
    """u ← shared · scales · u, with `scales` measured on each tensor before the step."""

    phase = fastreg.Phase.RULE

    def __init__(self, count):
        self.shared = torch.tensor(0.5, dtype=torch.float64)
        self.scales = torch.zeros(count, dtype=torch.float64)

    def stage(self, group):
        return Stage(two_scalars, lambda p, u, at, s, o: (p, u * s * o, ()), device_scalars=("shared", "own"))

    def device_scalars(self, device):
        return self.shared, self.scales

    def prepare(self, plan):
        (batch,) = plan.batches
        self.scales.copy_(torch.stack([p.sum() for p in batch.parameters]))


def test_device_scalars(backend):
    params = parameters()
    start = [p.detach().clone() for p in params]
    Toy(params, TrustRatio(len(params))).step()
    for p, p0 in zip(params, start, strict=True):
        expected = p0 - p.grad * 0.5 * p0.sum().double().float()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-6)


# Shards: a run of the whole tensor gets the whole tensor's noise -----------------------------------------


def noise_batch(tensor, first, stream=3, step=5, seed=11):
    """A batch that adds noise to zero weights."""
    component = GradientNoise(1.0)
    chain = Toy([torch.nn.Parameter(torch.zeros(1))], component).chain({}, torch.float32)
    return Batch(
        chain=chain, parameters=[tensor], gradients=[torch.zeros_like(tensor)], buffers=[], device_scalars=[],
        rng_keys=list(component.rng_keys(seed)), firsts=[first], streams=[stream],
        rows=[0], steps=[step], step_scalars=[[1.0]],
    )  # fmt: skip


def drawn(first, count):
    tensor = torch.zeros(count)
    launch.run(noise_batch(tensor, first))
    return -tensor


@pytest.mark.slow(backend="compiled")
@pytest.mark.parametrize("origin", [0, 2**33 + 16])
def test_shards_draw_what_the_whole_draws(backend, origin):
    whole = drawn(origin, 9000)
    cuts = [0, 1, 5, 8, 13, 2000, 4104, 8999, 9000]
    parts = [drawn(origin + a, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.unique().numel() > 8990


def test_every_backend_draws_the_same(same):
    results = []
    for name in BACKENDS:
        with fastreg.use_backend(name):
            results.append(drawn(2**40 + 3, 5001))
    assert torch.equal(results[0], results[1]) and same(results[2], results[0])


# Alignment -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_misaligned_tensors(offset, same):
    """Views into a flat buffer start anywhere: the narrow path must give what the wide one gives."""

    def train(shift, name):
        store = torch.arange(3.0 * 5000 + 8).sin()
        params = [torch.nn.Parameter(store[shift + 5000 * i :][:4999]) for i in range(3)]
        with torch.no_grad():
            for i, p in enumerate(params):
                p.copy_(torch.arange(4999.0).mul(i + 1).cos())
                p.grad = torch.arange(4999.0).mul(i + 2).sin()
        optimizer = fastreg.AdamW(params, regularizers=[GradientNoise(0.1), fastreg.EMA(0.9)], seed=1)
        with fastreg.use_backend(name):
            optimizer.step()
        return [p.detach() for p in params] + [optimizer.state[p]["ema"] for p in params]

    for a, b in zip(train(offset, "triton"), train(0, "reference"), strict=True):
        assert same(a, b)


# Writing back: stochastic rounding and an exact remainder ------------------------------------------------


@triton.jit
def write_rounded(weight, at, key):
    bits = weight.to(tl.uint32, bitcast=True) + kernel_random.bits16(key, at, weight, 10)
    return ((bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True),)


def rounded(weight, at, key):
    bits = (weight.view(torch.int32).long() & 0xFFFFFFFF) + reference_random.bits16(key, at, weight, 10)
    return ((bits >> 16).to(torch.int16).view(torch.bfloat16),)


@triton.jit
def read_joined(high, low):
    wide = (high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16) | low.to(tl.uint16, bitcast=True).to(
        tl.uint32
    )
    return (wide - 0x8000).to(tl.float32, bitcast=True)


@triton.jit
def write_split(weight, at):
    wide = weight.to(tl.uint32, bitcast=True) + 0x8000
    high = (wide >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return high, wide.to(tl.uint16).to(tl.int16, bitcast=True)


def joined(high, low):
    wide = ((high.view(torch.int16).long() & 0xFFFF) << 16) | (low.long() & 0xFFFF)
    return (wide - 0x8000).to(torch.int32).view(torch.float32)


def split(weight, at):
    wide = (weight.view(torch.int32).long() & 0xFFFFFFFF) + 0x8000
    return (wide >> 16).to(torch.int16).view(torch.bfloat16), wide.to(torch.int16)


class Rounded(fastreg.Component):
    phase = fastreg.Phase.RULE

    def storage(self, group, dtype):
        return Storage(kernels=("storage.read_plain", write_rounded), write=rounded, rng_keys=("key",))

    def storage_rng_keys(self, seed):
        return (seed,)


class Split(fastreg.Component):
    phase = fastreg.Phase.RULE

    def storage(self, group, dtype):
        both, low = ("parameter", "low"), Buffer("low", torch.int16)
        kernels = (read_joined, write_split)
        return Storage(kernels, joined, split, sources=both, targets=both, buffers=(low,))


# Joining subtracts what splitting added, so a bf16 weight starts with a remainder of -2¹⁵.
def start_remainder(optimizer, params):
    for p in params:
        optimizer.state[p]["low"] = torch.full(p.shape, -(2**15), dtype=torch.int16)


def test_stochastic_write_back(backend):
    params = parameters(dtype=torch.bfloat16)
    exact = [p.detach().double() - 1e-3 * p.grad.double() for p in params]
    for p in params:
        p.grad.mul_(1e-3)
    exact = [p.detach().double() - p.grad.double() for p in params]
    Toy(params, Rounded(), seed=-5).step()
    for p, value in zip(params, exact, strict=True):
        assert ((p.double() - value).abs() <= torch.finfo(torch.bfloat16).eps * value.abs() + 1e-30).all()
    big, value = params[-1].double(), exact[-1]
    ulp = torch.exp2(value.abs().log2().floor()) * torch.finfo(torch.bfloat16).eps
    errors = (big - value) / ulp
    assert errors.abs().mean() > 0.05 and errors.mean().abs() < 4 * errors.std() / errors.numel() ** 0.5


def test_stochastic_write_back_is_the_same_everywhere():
    results = []
    for name in BACKENDS:
        params = parameters(dtype=torch.bfloat16)
        with fastreg.use_backend(name):
            Toy(params, Rounded(), seed=7).step()
        results.append([p.detach() for p in params])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_remainder_write_back_is_float32(backend):
    """Weight and remainder together follow the float32 run bit for bit."""
    params, wide = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    wide = [torch.nn.Parameter(p.float()) for p in wide]
    optimizer, baseline = Toy(params, Split()), Toy(wide)
    start_remainder(optimizer, params)
    for turn in range(3):
        for p, q in zip(params, wide, strict=True):
            p.grad = (torch.randn(p.shape, generator=torch.Generator().manual_seed(turn)) * 1e-3).bfloat16()
            q.grad = p.grad.float()
        optimizer.step(), baseline.step()
    for p, q in zip(params, wide, strict=True):
        assert torch.equal(joined(p.detach(), optimizer.state[p]["low"]), q.detach())
        assert torch.equal(p.detach(), split(q.detach(), None)[0])


def test_one_storage_at_a_time():
    with pytest.raises(ValueError, match="only one component"):
        Toy(parameters(), Rounded(), Split()).step()
