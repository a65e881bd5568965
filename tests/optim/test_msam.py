"""Momentum-SAM: against the published algorithm, evaluated, saved and skipped."""

import copy
import math

import pytest
import torch
from torch.nn import Parameter

import fastreg
from fastreg import EMA, MSAM, ClipNorm, SlowWeights

from .conftest import KINDS, equal, set_gradients, through_file, values, weights

# NumPy's, which runs Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

BASES = {
    "momentum": (fastreg.SGD, {"lr": 0.1, "momentum": 0.9}),
    "nesterov": (fastreg.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adamw": (fastreg.AdamW, {"lr": 0.01}),
    "amsgrad": (fastreg.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
}


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]


def pull(params, seed):
    """Gradients that depend on where they are taken."""
    set_gradients(params, seed)
    for p in params:
        p.grad += p.detach()


def train(optimizer, params, seeds):
    for seed in seeds:
        pull(params, seed)
        optimizer.step()


class Published:
    """Two loops over the parameters, as the authors have it; for AdamW with decay before the update."""

    def __init__(self, params, adam, lr, rho, weight_decay, clip):
        self.params, self.adam, self.lr, self.rho = params, adam, lr, rho
        self.weight_decay, self.clip = weight_decay, clip
        self.momenta, self.squares = ([torch.zeros_like(p) for p in params] for _ in range(2))
        self.factor = self.count = 0

    @torch.no_grad()
    def step(self):
        self.count += 1
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.params, self.clip)
        for p, v, s in zip(self.params, self.momenta, self.squares, strict=True):
            g = p.grad if self.adam else p.grad + self.weight_decay * p
            p.add_(self.factor * v)
            if self.adam:
                v.mul_(0.9).add_(0.1 * g)
                s.mul_(0.999).add_(0.001 * g * g)
                p.mul_(1 - self.lr * self.weight_decay)
                denominator = (s / (1 - 0.999**self.count)).sqrt() + 1e-8
                p.sub_(self.lr / (1 - 0.9**self.count) * v / denominator)
            else:
                v.mul_(0.9).add_(g)
                p.sub_(self.lr * v)
        norm = torch.cat([v.flatten() for v in self.momenta]).norm()
        self.factor = self.rho / (norm + 1e-12)
        for p, v in zip(self.params, self.momenta, strict=True):
            p.sub_(self.factor * v)


@pytest.mark.slow(backend="triton", adam=False)
@pytest.mark.slow(backend="triton", weight_decay=0.0)
@pytest.mark.parametrize("weight_decay, clip", [(0.0, None), (0.1, 0.5)], ids=("plain", "decay and clip"))
@pytest.mark.parametrize("adam", (False, True), ids=("SGD", "AdamW"))
def test_equals_the_published_algorithm(backend, adam, weight_decay, clip, close):
    """In float64 over many steps."""
    ours, theirs = weights(torch.float64), weights(torch.float64)
    components = [MSAM(0.3), *([] if clip is None else [ClipNorm(clip)])]
    make, options = (fastreg.AdamW, {}) if adam else (fastreg.SGD, {"momentum": 0.9})
    optimizer = make(ours, lr=0.01, weight_decay=weight_decay, regularizers=components, **options)
    published = Published(theirs, adam, 0.01, 0.3, weight_decay, clip)
    for seed in range(50 if backend == "triton" else 200):  # its interpreter is slow
        pull(ours, seed), pull(theirs, seed)
        optimizer.step(), published.step()
    close(ours, theirs)
    with optimizer.averaged("msam"):
        # The weights themselves, which lie ρ away.
        close(ours, [p + published.factor * v for p, v in zip(theirs, published.momenta, strict=True)])
        away = torch.cat([(p - q).detach().flatten() for p, q in zip(ours, theirs, strict=True)])
        assert float(away.norm()) == pytest.approx(0.3, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rho_of_0_is_the_plain_optimizer(base, kind):
    (make, options), (dtype, rounding) = base, KINDS[kind]
    ours, theirs = weights(dtype), weights(dtype)
    optimizer = make(ours, regularizers=[MSAM(0.0)], **options, **rounding)
    plain = make(theirs, **options, **rounding)
    train(optimizer, ours, range(6)), train(plain, theirs, range(6))
    assert equal(values(ours), values(theirs))
    for p, q in zip(ours, theirs, strict=True):
        assert all(torch.equal(optimizer.state[p][name], value) for name, value in plain.state[q].items())


def test_nesterov_is_a_special_case(backend, close):
    """With ρ = lr μ ‖v‖ the perturbed weights are those of torch's SGD with Nesterov momentum."""
    ours, theirs = weights(torch.float64), weights(torch.float64)
    component = MSAM(0.0)
    optimizer = fastreg.SGD(ours, lr=0.05, momentum=0.9, regularizers=[component])
    nesterov = torch.optim.SGD(theirs, lr=0.05, momentum=0.9, nesterov=True)
    momenta = [torch.zeros_like(p) for p in ours]
    for seed in range(10):
        pull(ours, seed), pull(theirs, seed)
        momenta = [0.9 * v + p.grad for v, p in zip(momenta, ours, strict=True)]
        component.rho = 0.05 * 0.9 * float(torch.cat([v.flatten() for v in momenta]).norm())
        optimizer.step(), nesterov.step()
        for p, q in zip(ours, theirs, strict=True):
            # 1e-12 is added to the norm.
            torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-11)


# Evaluation and checkpoints ------------------------------------------------------------------------------


def unperturbed_weights(optimizer, params):
    name = "exp_avg" if "exp_avg" in optimizer.state[params[0]] else "momentum_buffer"
    size = optimizer.state_dict()["param_groups"][0]["msam_size"]
    return [p.detach() + size * optimizer.state[p][name].to(p.dtype) for p in params]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_shows_the_weights_themselves(base, kind):
    (make, options), (dtype, rounding) = base, KINDS[kind]
    params = weights(dtype)
    optimizer = make(params, regularizers=[MSAM(0.5)], **options, **rounding)
    optimizer.eval(), optimizer.train()
    assert equal(values(params), values(weights(dtype)))  # not perturbed yet
    train(optimizer, params, range(3))
    perturbed, addresses = values(params), [p.data_ptr() for p in params]
    unperturbed = unperturbed_weights(optimizer, params)
    optimizer.eval()
    optimizer.eval()
    assert equal(values(params), unperturbed) and not any(map(torch.equal, unperturbed[:2], perturbed[:2]))
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\) first"):
        optimizer.step()
    optimizer.train()
    optimizer.train()
    with optimizer.averaged():
        assert equal(values(params), unperturbed)
    assert equal(values(params), perturbed) and [p.data_ptr() for p in params] == addresses


@pytest.mark.parametrize("evaluating", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_resumes_bit_for_bit(base, kind, evaluating):
    (make, options), (dtype, rounding) = base, KINDS[kind]
    params, others = weights(dtype), weights(dtype)
    optimizer, other = (make(p, regularizers=[MSAM(0.5)], **options, **rounding) for p in (params, others))
    train(optimizer, params, range(3)), train(other, others, range(7, 9))
    if evaluating:
        optimizer.eval()
    saved, state = through_file(values(params), optimizer.state_dict())
    with torch.no_grad():
        for p, w in zip(others, saved, strict=True):
            p.copy_(w)
    other.load_state_dict(state)
    for o, o_params in ((optimizer, params), (other, others)):
        o.train()
        train(o, o_params, range(3, 7))
    assert equal(values(params), values(others))
    optimizer.eval(), other.eval()
    assert equal(values(params), values(others))


def test_copies(base):
    make, options = base
    params = weights()
    optimizer = make(params, regularizers=[MSAM(0.5)], **options)
    train(optimizer, params, range(3))
    twin, twins = copy.deepcopy((optimizer, params))
    for o, o_params in ((optimizer, params), (twin, twins)):
        train(o, o_params, range(3, 6))
    assert equal(values(params), values(twins))


def test_averages_are_of_the_weights_themselves(close):
    """Where gradients do not depend on the weights, averages and Lookahead are those without MSAM."""
    ours, theirs = weights(torch.float64), weights(torch.float64)
    optimizer, plain = (
        fastreg.AdamW(p, lr=0.1, regularizers=[EMA(0.5), SlowWeights(2), *more])
        for p, more in ((ours, [MSAM(0.5)]), (theirs, []))
    )
    for seed in range(5):
        set_gradients(ours, seed), set_gradients(theirs, seed)
        optimizer.step(), plain.step()
        for name in ("ema", "slow"):
            close([optimizer.state[p][name] for p in ours], [plain.state[p][name] for p in theirs])
    assert not any(map(torch.equal, values(ours), values(theirs)))
    with optimizer.averaged("msam"):
        close(ours, theirs)
    optimizer.eval(), plain.eval()  # the average comes first
    close(ours, theirs)


def test_remainder_is_float32(base):
    """Weight and remainder follow the float32 run with the same gradients bit for bit."""
    make, options = base
    narrow = weights(torch.bfloat16)
    wide = [Parameter(p.detach().float()) for p in narrow]
    optimizer = make(narrow, regularizers=[MSAM(0.5)], bf16="remainder", **options)
    baseline = make(wide, regularizers=[MSAM(0.5)], **options)
    for seed in range(6):
        set_gradients(narrow, seed)
        for p, q in zip(narrow, wide, strict=True):
            q.grad = p.grad.float()
        optimizer.step(), baseline.step()
    for p, q in zip(narrow, wide, strict=True):
        joined = fastreg.reference.storage.read_split(p.detach(), optimizer.state[p]["remainder"])
        assert torch.equal(joined, q.detach())


# Steps that are left out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", (math.inf, math.nan))
@pytest.mark.parametrize("when", (0, 3))
@pytest.mark.parametrize("how", ("skip", "scaler"))
def test_skipped_steps_leave_no_trace(base, how, when, bad):
    """Also of the size of the perturbation, which the next step takes out."""
    make, options = base
    ours, theirs = weights(), weights()
    more = {"nonfinite": "skip"} if how == "skip" else {"fused": True}
    optimizer = make(ours, regularizers=[MSAM(0.5)], **options, **more)
    plain = make(theirs, regularizers=[MSAM(0.5)], **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=how == "scaler")
    for seed in range(5):
        pull(ours, seed)
        scaler.scale(torch.ones(()))
        for p in ours:
            p.grad.mul_(scaler.get_scale())
        if seed == when:
            ours[0].grad[5] = bad
        before = values(ours)
        scaler.step(optimizer)
        scaler.update()
        assert equal(values(ours), before) == (seed == when)
        if seed != when:
            train(plain, theirs, [seed])
    assert equal(values(ours), values(theirs))
    with optimizer.averaged(), plain.averaged():
        assert equal(values(ours), values(theirs))


def test_missing_gradients_leave_a_parameter_perturbed_as_it_is(close):
    """What is taken out at its next step is what has been put in."""
    params = [Parameter(torch.ones(3, dtype=torch.float64)), Parameter(torch.ones(2, dtype=torch.float64))]
    optimizer = fastreg.SGD(params, lr=0.1, momentum=0.9, regularizers=[MSAM(0.5)])
    mirror = values(params)
    momenta = [torch.zeros_like(p) for p in params]
    for without in ((), (1,), (1,), (), (0,), ()):
        set_gradients(params, 0, *without)
        for i, p in enumerate(params):
            if p.grad is not None:
                momenta[i] = 0.9 * momenta[i] + p.grad
                mirror[i] = mirror[i] - 0.1 * momenta[i]
        before = values(params)
        optimizer.step()
        assert all(torch.equal(params[i], before[i]) for i in without)
        with optimizer.averaged():
            close(params, mirror)


# Refusals ------------------------------------------------------------------------------------------------


def test_refusals():
    params = weights()
    for rho in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="rho must be"):
            MSAM(rho)
    for make, options, message in (
        (fastreg.SGD, {"lr": 0.1}, r"MSAM needs momentum: SGD\(momentum=0.9\), Adam or AdamW; got SGD"),
        (fastreg.Lion, {}, r"MSAM needs momentum: SGD\(momentum=0.9\), Adam or AdamW; got Lion"),
    ):
        with pytest.raises(ValueError, match=message):
            make(params, regularizers=[MSAM()], **options)
    with pytest.raises(ValueError, match="'msam' is given more than once"):
        fastreg.AdamW(params, regularizers=[MSAM(), MSAM()])
    optimizer = fastreg.AdamW(params[:1], regularizers=[MSAM()])
    with pytest.raises(ValueError, match="cautious"):
        optimizer.add_param_group({"params": params[1:], "decay": "cautious"})


def test_cautious_decay_of_all_groups_is_refused():
    with pytest.raises(ValueError, match="does not go with decay='cautious'"):
        fastreg.AdamW(weights(), decay="cautious", regularizers=[MSAM()])
