"""Stages and norms of SAM and MSAM: kernel and compiled form against the reference, bit for bit."""

import math

import pytest
import torch

import fastreg
from fastreg.common.random import Purpose
from fastreg.engine import launch
from fastreg.engine.batch import Batch, NormSpec
from fastreg.engine.rounding import Rounding
from fastreg.engine.stage import PLAIN, Buffer, Chain, Stage
from fastreg.optim.msam import MSAM
from fastreg.optim.perturb import _Ascend, _ScaleByWeights
from fastreg.optim.rules import Descend
from fastreg.reference import rules
from fastreg.reference.step import compute_dtype

SIZES = [1, 127, 0, 33 * 65, 2 * 4096 + 17]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def rule(name, buffers, step_scalars):
    momentum = tuple(Buffer(buffer, "compute") for buffer in buffers)
    return Stage(
        f"rules.{name}",
        getattr(rules, name),
        momentum,
        ("prev_perturbation",),
        step_scalars=step_scalars,
        momentum=True,
    )


DESCEND = Stage("rules.descend", rules.descend)
MOMENTUM = (Descend(momentum=True)._stage, MSAM._stage)
# The stages, and the numbers of all of them.
CHAINS = {
    "adaptive": ((_ScaleByWeights._stage, DESCEND), [1.0, 0.01]),
    "perturb": ((_Ascend._plain,), [0.05]),
    "perturb_adaptive": ((_ScaleByWeights._stage, _Ascend._adaptive), [1.0, 0.01, 1.0, 0.01, 0.5]),
    "perturb_momentum": ((MSAM._stage,), []),
    "sgd_momentum_msam": (
        (rule("sgd_momentum", ["momentum_buffer"], 3), *MOMENTUM), [0.9, 0.7, 0.1],
    ),
    "sgd_nesterov_msam": (
        (rule("sgd_nesterov", ["momentum_buffer"], 4), *MOMENTUM), [0.9, 1.0, 0.1, 0.09],
    ),
    "adam_msam": (
        (rule("adam", ["exp_avg", "exp_avg_sq"], 6), *MOMENTUM), [0.1, 0.99, 0.01, 0.2, 1.5, 1e-8],
    ),
    "adam_amsgrad_msam": (
        (rule("adam_amsgrad", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"], 6), *MOMENTUM),
        [0.1, 0.99, 0.01, 0.2, 1.5, 1e-8],
    ),
}  # fmt: skip
LAYOUTS = [
    (torch.float32, 0), (torch.float32, 1), (torch.float64, 0), (torch.bfloat16, 0),
    pytest.param(torch.float64, 1, marks=pytest.mark.slow),
    pytest.param(torch.bfloat16, 1, marks=pytest.mark.slow),
]  # fmt: skip
"""Dtypes, and elements by which tensors are misaligned."""


def batch(name, dtype, offset=0, device_scalars=(0.3, 0.2), gradient_scale=1.0):
    """A batch whose tensors start `offset` elements behind where an allocation does."""
    generator = torch.Generator().manual_seed(0)

    def draw(size, dtype=dtype):
        store = torch.empty(size + offset, dtype=dtype)[offset:]
        return store.copy_(torch.randn(size, generator=generator, dtype=torch.float64))

    stages, step_scalars = CHAINS[name]
    rounding = Rounding("stochastic", Purpose.PERTURBATION)
    storage = rounding.storage({}, dtype) or PLAIN
    chain = Chain(stages, storage)
    parameters = [draw(size) for size in SIZES]
    gradients = [draw(size).mul_(gradient_scale) for size in SIZES]
    wanted = [name for stage in stages for name in stage.device_scalars]
    return Batch(
        chain=chain, parameters=parameters, gradients=gradients,
        buffers=[
            [draw(size, buffer_dtype).abs_() for size in SIZES]
            for buffer in chain.buffers
            for buffer_dtype in [compute_dtype(dtype) if buffer.dtype == "compute" else dtype]
        ],
        device_scalars=[
            torch.tensor(value, dtype=torch.float64)
            for _, value in zip(wanted, device_scalars, strict=False)
        ],
        rng_keys=list(rounding.storage_rng_keys(0)) if storage.rng_keys else [],
        firsts=[0] * len(SIZES), streams=list(range(len(SIZES))), rows=[0] * len(SIZES),
        steps=[3], step_scalars=[step_scalars],
    )  # fmt: skip


def snapshot(made):
    return [t.clone() for t in (*made.parameters, *(t for buffer in made.buffers for t in buffer))]


def stepped(backend, *args, **options):
    with fastreg.use_backend(backend):
        made = batch(*args, **options)
        launch.run(made)
    return snapshot(made)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_kernels_equal_the_reference(name, dtype, same, close):
    actual, expected = stepped("triton", name, dtype), stepped("reference", name, dtype)
    if dtype == torch.float64:
        close(actual, expected)
    else:
        assert all(map(same, actual, expected))
    assert not any(map(torch.equal, expected[3:5], snapshot(batch(name, dtype))[3:5]))


@pytest.mark.parametrize("name, dtype", [("perturb", torch.float32), ("perturb_adaptive", torch.bfloat16)])
def test_compiled_equals_the_reference(name, dtype):
    actual, expected = stepped("compiled", name, dtype), stepped("reference", name, dtype)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("name", ["perturb", "perturb_adaptive", "sgd_momentum_msam", "adam_msam"])
def test_misaligned_tensors(name, offset, same):
    actual = stepped("triton", name, torch.float32, offset=offset)
    assert all(map(same, actual, stepped("reference", name, torch.float32)))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("name, dtype", [("perturb", torch.float32), ("perturb_adaptive", torch.bfloat16)])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in Triton's interpreter
def test_a_size_of_0_leaves_every_bit(backend, name, bad, dtype):
    """Whatever the gradients are; the backup is the weight."""
    expected = batch(name, dtype).parameters
    actual = stepped(backend, name, dtype, device_scalars=(0.0,), gradient_scale=bad)
    assert all(map(torch.equal, actual[: len(SIZES)], expected))
    assert all(map(torch.equal, actual[len(SIZES) :], expected))


def norm(made, of):
    before = snapshot(made)
    result = launch.measure([made], torch.tensor([math.inf, 1.0], dtype=torch.float64), of)
    assert all(map(torch.equal, snapshot(made), before))  # measuring writes nothing
    return float(result[2])


def of_elements(values, largest):
    """Of what was worked out in double: the largest, or the Euclidean norm."""
    values = torch.cat(values)
    return float(values.abs().max() if largest else values.norm())


def allowed(dtype, exact):
    return (1e-12 if dtype == torch.float64 else 3e-7) * exact


@pytest.mark.parametrize("dtype, offset", LAYOUTS, ids=str)
@pytest.mark.parametrize("largest", [False, True])
def test_norm_of_scaled_gradients(backend, dtype, largest, offset):
    made = batch("perturb_adaptive", dtype, offset=offset)
    pairs = zip(made.parameters, made.gradients, strict=True)
    exact = of_elements([(p.double().abs() + 0.01) * g.double() for p, g in pairs], largest)
    assert abs(norm(made, NormSpec(1, "largest" if largest else "l2")) - exact) <= allowed(dtype, exact)


@pytest.mark.slow(name=("sgd_nesterov_msam", "adam_amsgrad_msam"), backend="compiled")
@pytest.mark.parametrize("dtype, offset", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", [name for name in CHAINS if name.endswith("_msam")])
def test_norm_of_the_momentum_to_come(backend, name, dtype, offset):
    """That of the buffer after the step, in compute precision."""
    made = batch(name, dtype, offset=offset)
    pairs = list(zip(made.buffers[0], made.gradients, strict=True))
    step_scalars = CHAINS[name][1]
    if name.startswith("sgd"):
        momentum = [step_scalars[0] * m.double() + step_scalars[1] * g.double() for m, g in pairs]
    else:
        momentum = [m.double() + step_scalars[0] * (g.double() - m.double()) for m, g in pairs]
    exact = of_elements(momentum, False)
    assert abs(norm(made, NormSpec(kind="momentum")) - exact) <= allowed(dtype, exact)


def test_scaled_norms_of_several_batches(backend):
    """One norm over all dtypes."""
    made = [batch("perturb_adaptive", dtype) for dtype in DTYPES]
    total = launch.measure(made, torch.tensor([math.inf, 1.0], dtype=torch.float64), NormSpec(1))[1]
    parts = [norm(one, NormSpec(1)) ** 2 for one in made]
    assert float(total) == pytest.approx(sum(parts), rel=1e-12)
