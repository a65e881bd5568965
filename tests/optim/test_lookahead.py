"""Lookahead: the paper's recursion, fastreg's and foreign optimizers alike, checkpoints in mid-period."""

import copy
import io
import pickle
from itertools import pairwise

import pytest
import torch
from torch.nn import Parameter

import fastreg
from fastreg import SAM, SGD, AdamW, ClipNorm, Lookahead, SlowWeights

MODES = ("none", "reset", "pullback")
BASES = {
    "sgd": (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (AdamW, torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
}


def minimise(optimizer, parameters, steps):
    """Steps down ½|p|²."""
    for _ in range(steps):
        for p in parameters:
            p.grad = p.detach().clone()
        optimizer.step()


def make(base, mode="none", k=3, alpha=0.5, shapes=((5,), (2, 3)), dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(0)
    parameters = [
        Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes
    ]
    return Lookahead(base(parameters, **options), k, alpha, mode), parameters


@pytest.mark.parametrize("base", (SGD, torch.optim.SGD))
@pytest.mark.parametrize(
    "k, expected", ((5, (0.795245, 0.632414610025, 0.502924556549)), (2, (0.905, 0.819025, 0.741217625)))
)
def test_closed_form(backend, base, k, expected):
    """On ½λp², a period multiplies by 1 - α + α(1 - lr·λ)^k; the first one counts."""
    weight = Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = Lookahead(base([weight], lr=0.1), k=k, alpha=0.5)
    for value in expected:
        minimise(optimizer, [weight], k)
        assert (weight.detach() - value).abs().max() < 1e-12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("base", BASES)
def test_by_hand(backend, base, mode, close):
    """Around torch's optimizer, said plainly; the fused form and the one around torch are equal to it."""
    ours, theirs, options = BASES[base]
    fused, mine = make(ours, mode, **options)
    around, yours = make(theirs, mode, **options)
    _, weights = make(theirs, mode, **options)
    optimizer = theirs(weights, **options)
    slow = [p.detach().clone() for p in weights]
    moments = [torch.zeros_like(p) for p in weights]
    for step in range(1, 8):
        minimise(optimizer, weights, 1)
        minimise(fused, mine, 1)
        minimise(around, yours, 1)
        if step % 3 == 0:
            for p, s, m in zip(weights, slow, moments, strict=True):
                s += 0.5 * (p.detach() - s)
                p.data.copy_(s)
                name = "exp_avg" if "exp_avg" in optimizer.state[p] else "momentum_buffer"
                if mode == "reset":
                    optimizer.state[p][name].zero_()
                elif mode == "pullback":
                    m += 0.5 * (optimizer.state[p][name] - m)
                    optimizer.state[p][name].copy_(m)
        close(mine, weights)
        close(yours, weights)
    close([fused.state[p]["slow"] for p in mine], slow)
    close([around._sync.state[p]["slow"] for p in yours], slow)


def test_noisy_quadratic():
    """Proposition 2: what is left of SGD's variance, from 2e5 coordinates (0.3 % off at 1 σ)."""
    lr, k, alpha = 0.1, 5, 0.5
    keep = (1 - lr) ** k
    sgd = lr**2 / (1 - (1 - lr) ** 2)
    expected = alpha**2 * (1 - keep**2) / (1 - (1 - alpha + alpha * keep) ** 2) * sgd
    assert expected / sgd == pytest.approx(0.442973, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    weight = Parameter(torch.zeros(200_000))
    optimizer = Lookahead(SGD([weight], lr=lr), k, alpha)
    with fastreg.use_backend("reference"):
        for _ in range(40 * k):
            weight.grad = weight.detach() + torch.randn(weight.shape, generator=generator)
            optimizer.step()
    assert weight.detach().square().mean().item() == pytest.approx(expected, rel=5 * 0.0032)


def test_as_a_piece(backend, close):
    """The wrapper around a fastreg optimizer is the component."""
    wrapped, mine = make(AdamW, lr=0.1)
    _, yours = make(AdamW, lr=0.1)
    component = AdamW(yours, lr=0.1, regularizers=[SlowWeights(3, 0.5)])
    minimise(wrapped, mine, 5)
    minimise(component, yours, 5)
    assert all(map(torch.equal, mine, yours))


@pytest.mark.parametrize("base", (SGD, torch.optim.SGD))
def test_slow_weights_start_at_construction(base):
    optimizer, (weight, other) = make(base, k=1, lr=0.0)
    start = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    minimise(optimizer, [weight, other], 1)
    torch.testing.assert_close(weight.detach(), start + 0.5, rtol=0, atol=1e-12)


@pytest.mark.parametrize("base", (SGD, torch.optim.SGD))
def test_slow_weights_are_wide(base):
    """bfloat16 weights at 1 whose slow weights move by 2⁻¹⁰ a period: rounded, they would stay."""
    weight = Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = Lookahead(base([weight], lr=0.0), k=1, alpha=2**-3)
    for count in range(1, 4):
        with torch.no_grad():
            weight.fill_(1 + 2**-7)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        slow = (optimizer._sync or optimizer.fused_optimizer).state[weight]["slow"]
        assert slow.dtype == torch.float32
        expected = 1 + 2**-7 * (1 - (1 - 2**-3) ** count)
        assert (slow - expected).abs().max() < 1e-6


@pytest.mark.parametrize("base", (SGD, torch.optim.SGD))
def test_a_parameter_without_gradient_when_it_is_time(base):
    """fastreg counts each parameter's own steps; around torch all synchronise together, this one as well."""
    optimizer, (weight, other) = make(base, k=2, lr=0.1)
    start = other.detach().clone()
    minimise(optimizer, [weight, other], 1)
    other.grad = None
    minimise(optimizer, [weight], 1)
    halfway = start + 0.5 * (0.9 * start - start)
    torch.testing.assert_close(other.detach(), 0.9 * start if base is SGD else halfway, rtol=0, atol=1e-12)
    minimise(optimizer, [weight, other], 1)
    halfway = start + 0.5 * (0.81 * start - start) if base is SGD else 0.9 * halfway
    torch.testing.assert_close(other.detach(), halfway, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("mode", ("none", "pullback"))
@pytest.mark.parametrize("base", (AdamW, torch.optim.AdamW, SGD))
@pytest.mark.parametrize("shown", (False, True))
def test_resumed_in_mid_period(base, mode, dtype, shown):
    """Interrupted between two synchronisations, also while slow weights are shown: the same bits."""
    options = {"lr": 0.05} | ({"momentum": 0.9} if base is SGD else {})
    optimizer, parameters = make(base, mode, dtype=dtype, **options)
    minimise(optimizer, parameters, 4)
    if shown:
        optimizer.eval()
    file = io.BytesIO()
    torch.save(([p.detach() for p in parameters], optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed, others = make(base, mode, k=7, alpha=0.1, dtype=dtype, **options)  # as saved, not as made
    with torch.no_grad():
        for p, w in zip(others, weights, strict=True):
            p.copy_(w)
    resumed.load_state_dict(state)
    for each in (optimizer, resumed):
        each.train()
    assert resumed.param_groups[0]["lookahead_k"] == 3
    assert resumed.param_groups[0]["lookahead_alpha"] == 0.5
    minimise(optimizer, parameters, 5)
    minimise(resumed, others, 5)
    assert all(map(torch.equal, parameters, others))


@pytest.mark.parametrize("base", (AdamW, torch.optim.AdamW))
def test_evaluated_with_slow_weights(base):
    optimizer, parameters = make(base, lr=0.1, dtype=torch.float32)
    minimise(optimizer, parameters, 4)
    fast = [p.detach().clone() for p in parameters]
    slow = [(optimizer._sync or optimizer.fused_optimizer).state[p]["slow"].clone() for p in parameters]
    assert not any(map(torch.equal, fast, slow))
    places = [p.data_ptr() for p in parameters]
    with optimizer.averaged():
        assert all(map(torch.equal, parameters, slow))
        with pytest.raises(RuntimeError, match="averaged|train"):
            optimizer.step()
    optimizer.eval()
    versions = [p._version for p in parameters]
    optimizer.eval()  # at once: nothing is written
    assert [p._version for p in parameters] == versions
    assert all(map(torch.equal, parameters, slow))
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        optimizer.step()
    optimizer.train()
    optimizer.train()
    assert all(map(torch.equal, parameters, fast))
    assert [p.data_ptr() for p in parameters] == places
    minimise(optimizer, parameters, 2)


@pytest.mark.parametrize("base", (SGD, torch.optim.SGD))
@pytest.mark.parametrize("mode", MODES)
def test_skipped_steps_do_not_count(base, mode):
    """An infinity under a scaler leaves weights, slow weights, moments and the period alone."""
    options = {"lr": 0.1, "momentum": 0.9, **({"fused": True} if base is SGD else {})}
    plain, expected = make(base, mode, k=2, dtype=torch.float32, **options)
    scaled, parameters = make(base, mode, k=2, dtype=torch.float32, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    for step in range(6):
        bad = step in (1, 2)
        for p in parameters:
            p.grad = p.detach() * scaler.get_scale()
            if bad:
                p.grad.view(-1)[0] = float("inf")
        if not bad:
            minimise(plain, expected, 1)
        scaler.scale(torch.ones(()))  # or the scaler has not begun
        scaler.step(scaled)
        scaler.update()
        assert all(map(torch.equal, parameters, expected))


def test_with_sam_and_clipping(close):
    """Lookahead around SAM around AdamW: all of it in the passes of SAM."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, generator=generator, dtype=torch.float64)
    weight, expected = Parameter(start.clone()), Parameter(start.clone())
    optimizer = Lookahead(SAM([weight], AdamW, rho=0.1, lr=0.1, regularizers=[ClipNorm(0.5)]), k=2)
    plain = torch.optim.AdamW([expected], lr=0.1)
    slow = start.clone()
    scales = torch.arange(1.0, 7.0, dtype=torch.float64)
    for step in range(1, 5):
        weight.grad = scales * weight.detach()
        optimizer.first_step(zero_grad=True)
        weight.grad = scales * weight.detach()
        optimizer.step()
        first = scales * expected.detach()
        gradient = scales * (expected.detach() + 0.1 * first / first.norm())
        expected.grad = gradient * min(1.0, 0.5 / (gradient.norm().item() + 1e-6))
        plain.step()
        if step % 2 == 0:
            slow += 0.5 * (expected.detach() - slow)
            expected.data.copy_(slow)
        close(weight, expected)


@pytest.mark.parametrize("base", (AdamW, torch.optim.AdamW))
def test_schedulers_and_copies(base):
    optimizer, parameters = make(base, lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    rates = []
    for _ in range(3):
        minimise(optimizer, parameters, 1)
        schedule.step()
        rates.append(optimizer.base_optimizer.param_groups[0]["lr"])
    assert all(b == a / 2 for a, b in pairwise(rates))
    for twin in (
        copy.deepcopy(optimizer),
        pickle.loads(pickle.dumps(optimizer)),
    ):
        others = [p for group in twin.param_groups for p in group["params"]]
        kept = [p.detach().clone() for p in parameters]
        minimise(twin, others, 2)
        assert all(map(torch.equal, parameters, kept))  # the original is left alone
    minimise(optimizer, parameters, 2)
    assert all(map(torch.equal, parameters, others))


@pytest.mark.parametrize("base, steps", ((SGD, 2), (torch.optim.SGD, 1)))
def test_added_parameters(base, steps, close):
    optimizer, parameters = make(base, k=2, lr=0.1)
    minimise(optimizer, parameters, 1)
    late = Parameter(torch.ones(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [late]})
    minimise(optimizer, [*parameters, late], steps)
    close(late, torch.full_like(late, 1 - 0.5 * (1 - 0.9**steps)))


def test_wrong_arguments():
    weight = Parameter(torch.ones(1))
    for options, message in (
        ({"k": 0}, r"k must be a whole number >= 1, got k=0"),
        ({"k": 2.5}, r"got k=2.5"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got alpha=1.5"),
        (
            {"pullback_momentum": "all"},
            r"pullback_momentum must be one of 'none', 'reset', 'pullback', got 'all'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Lookahead(SGD([weight], lr=0.1), **options)
    with pytest.raises(TypeError, match=r"Lookahead\(fastreg.AdamW\(model.parameters\(\)\)\)"):
        Lookahead([weight])
    with pytest.raises(ValueError, match="'SlowWeights' is given more than once"):
        Lookahead(Lookahead(SGD([weight], lr=0.1)))
