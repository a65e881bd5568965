"""Averages of the weights: against torch.optim.swa_utils, and swapped in and out."""

import copy

import pytest
import torch
from torch.nn import Parameter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastreg
from fastreg import EMA, SGD, SWA, ClipNorm, GradientNoise, SlowWeights


@pytest.fixture
def trained(Race):
    """An optimizer with two averages, after three steps, and its parameters."""
    race = Race()
    optimizer = SGD(race.ours, lr=0.1, regularizers=[EMA(0.5), EMA(0.9, name="slow")])
    for _ in range(3):
        race.gradients()
        optimizer.step()
    return optimizer, race.ours


@pytest.mark.parametrize("decay", (pytest.param(0.0, marks=pytest.mark.slow), 0.999))
def test_ema_equals_torch(rule, backend, decay, Race, close):
    race = Race()
    ours = rule(race.ours, regularizers=[ClipNorm(1e9), EMA(decay)])
    theirs = rule.oracle(race.theirs)
    model = torch.nn.ParameterList(race.theirs)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    average.update_parameters(model)  # the first call copies
    for _ in range(4):
        race.step(ours, theirs)
        average.update_parameters(model)
    close([ours.state[p]["ema"] for p in race.ours], list(average.parameters()))


def test_closed_form(backend, close):
    """Constant steps of -1 from 0: average_t = -(t - β(1 - βᵗ)/(1 - β))."""
    weight, decay, steps = Parameter(torch.zeros(4, dtype=torch.float64)), 0.75, 9
    optimizer = SGD([weight], lr=1.0, regularizers=[EMA(decay)])
    weight.grad = torch.ones_like(weight)
    for _ in range(steps):
        optimizer.step()
    expected = -(steps - decay * (1 - decay**steps) / (1 - decay))
    close(optimizer.state[weight]["ema"], torch.full_like(weight, expected))


def test_an_average_starts_when_its_parameter_does(Race):
    race = Race([(3,), (4,)])
    optimizer = SGD(race.ours, lr=0.1, regularizers=[EMA(0.5)])
    start = race.ours[1].detach().clone()
    race.gradients(1)
    optimizer.step()
    with optimizer.averaged():
        assert torch.equal(race.ours[1], start)
    race.gradients()
    optimizer.step()
    expected = (start + race.ours[1].detach()) / 2
    torch.testing.assert_close(optimizer.state[race.ours[1]]["ema"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name, key", ((None, "ema"), ("ema", "ema"), ("slow", "slow")))
def test_swapped_in_and_back(trained, name, key):
    optimizer, parameters = trained
    before = [p.detach().clone() for p in parameters]
    addresses = [p.data_ptr() for p in parameters]
    with optimizer.averaged(name) as inside:
        assert inside is None
        for p in parameters:
            assert torch.equal(p, optimizer.state[p][key])
    assert all(map(torch.equal, parameters, before))
    with pytest.raises(ZeroDivisionError), optimizer.averaged(name):
        1 / 0  # noqa: B018
    assert all(map(torch.equal, parameters, before))
    assert [p.data_ptr() for p in parameters] == addresses
    optimizer.step()
    assert not any(map(torch.equal, parameters, before))


def test_the_averages_differ(trained):
    optimizer, parameters = trained
    assert not any(torch.equal(optimizer.state[p]["ema"], optimizer.state[p]["slow"]) for p in parameters)


@pytest.mark.parametrize("inner", (None, "slow"))
def test_not_nested(trained, inner):
    optimizer, parameters = trained
    before = [p.detach().clone() for p in parameters]
    with optimizer.averaged():
        with pytest.raises(RuntimeError, match="swapped in already"), optimizer.averaged(inner):
            pass
        assert torch.equal(parameters[0], optimizer.state[parameters[0]]["ema"])
    assert all(map(torch.equal, parameters, before))


def test_no_step_inside(trained):
    optimizer, parameters = trained
    before = [p.detach().clone() for p in parameters]
    with optimizer.averaged():
        with pytest.raises(RuntimeError, match="inside `with optimizer.averaged"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="inside `with optimizer.averaged"):
            optimizer.load_state_dict(optimizer.state_dict())
        with pytest.raises(RuntimeError, match="inside `with optimizer.averaged"):
            optimizer.step()
    assert all(map(torch.equal, parameters, before))


def test_saved_averages_swap_in_after_loading(trained):
    optimizer, parameters = trained
    fresh = [Parameter(p.detach().clone()) for p in parameters]
    other = SGD(fresh, lr=0.1, regularizers=[EMA(0.5), EMA(0.9, name="slow")])
    other.load_state_dict(optimizer.state_dict())
    with other.averaged("slow"):
        assert all(torch.equal(q, optimizer.state[p]["slow"]) for p, q in zip(parameters, fresh, strict=True))


def test_unknown_average(trained):
    optimizer, parameters = trained
    with pytest.raises(ValueError, match="'fast', only 'ema', 'slow'"), optimizer.averaged("fast"):
        pass
    plain = SGD(parameters, lr=0.1)
    for name in (None, "ema"):
        with pytest.raises(ValueError, match=r"regularizers=\[fastreg.EMA"), plain.averaged(name):
            pass


def test_order_of_regularizers_does_not_matter(rule, Race):
    components = (lambda: ClipNorm(1.0), lambda: GradientNoise(0.1), lambda: EMA(0.9))
    results = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        race = Race()
        optimizer = rule(race.ours, regularizers=[components[i]() for i in order], seed=1)
        for _ in range(3):
            race.gradients()
            optimizer.step()
        results.append([t for p in race.ours for t in (p.detach(), optimizer.state[p]["ema"])])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def follow(optimizer, weight, targets):
    """Train a weight to be each of the targets in turn, with SGD at lr 1."""
    for target in targets:
        weight.grad = weight.detach() - target
        optimizer.step()


def test_swa_is_the_plain_mean(backend, close):
    """Of 0.9ᵗ, t = 1..10: 0.9 (1 - 0.9¹⁰) / (10 · 0.1)."""
    weight = Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = SGD([weight], lr=0.1, regularizers=[SWA()])
    for _ in range(10):
        weight.grad = weight.detach().clone()
        optimizer.step()
    close(optimizer.state[weight]["swa"], torch.full_like(weight, 0.9 * 0.6513215599))


@pytest.mark.slow(start=(1, 2))
@pytest.mark.parametrize("start, period", ((1, 1), (2, 1), (3, 2)))
def test_swa_equals_torch(rule, backend, start, period, Race, close):
    race = Race()
    ours, theirs = rule(race.ours, regularizers=[SWA(start, period)]), rule.oracle(race.theirs)
    model = torch.nn.ParameterList(race.theirs)
    average = AveragedModel(model)
    for step in range(1, 8):
        race.step(ours, theirs)
        if step >= start and (step - start) % period == 0:
            average.update_parameters(model)
    close([ours.state[p]["swa"] for p in race.ours], list(average.parameters()))


def test_the_first_weights_of_swa_are_copied(backend, Race):
    """Bit for bit, whatever the average held before: a difference of both would not be."""
    race = Race()
    optimizer = SGD(race.ours, lr=1e3, regularizers=[SWA(2)])
    for _ in range(2):
        race.gradients()
        optimizer.step()
    assert all(torch.equal(optimizer.state[p]["swa"], p) for p in race.ours)


def test_ema_of_a_geometric_series(backend, close):
    """d^n + (1 - d) r (r^n - d^n) / (r - d), with d = 0.5, r = 0.9, n = 10."""
    weight = Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = SGD([weight], lr=0.1, regularizers=[EMA(0.5)])
    for _ in range(10):
        weight.grad = weight.detach().clone()
        optimizer.step()
    d, r, n = 0.5, 0.9, 10
    expected = d**n + (1 - d) * r * (r**n - d**n) / (r - d)
    assert expected == pytest.approx(0.3921411748, abs=1e-10)
    close(optimizer.state[weight]["ema"], torch.full_like(weight, expected))


WARMUPS = {
    "ratio": (lambda t: (1 + t) / (10 + t), {"warmup": "ratio"}),
    "power": (lambda t: 1 - (1 + t / 2) ** -0.75, {"warmup": "power", "gamma": 2.0, "power": 0.75}),
    "least": (lambda t: max(0.4, 1 - 1 / (1 + t)), {"warmup": "power", "power": 1.0, "min_decay": 0.4}),
    "none": (lambda t: 0.7, {}),
}


@pytest.mark.parametrize("capturable", (False, True))
@pytest.mark.parametrize("start, period", ((0, 1), (0, 3), (2, 1), (3, 2)))
@pytest.mark.parametrize("warmup", WARMUPS)
def test_warm_up(warmup, start, period, capturable, close):
    """Against the definition; after `start` steps the average is the weight, then it is updated."""
    decay, options = WARMUPS[warmup]
    weight = Parameter(torch.ones(3, dtype=torch.float64))
    average = EMA(0.7, start=start, every=period, **options)
    optimizer = fastreg.AdamW([weight], lr=0.1, capturable=capturable, regularizers=[average])
    expected, updates = weight.detach().clone(), 0
    for step in range(1, 13):
        weight.grad = torch.full_like(weight, (-1.0) ** step * step)
        optimizer.step()
        if start and step == start:
            expected = weight.detach().clone()
        elif step > start and (step - start) % period == 0:
            d = min(0.7, decay(updates))
            expected, updates = d * expected + (1 - d) * weight.detach(), updates + 1
        if step >= max(start, 1):
            close(optimizer.state[weight]["ema"], expected)
    assert updates == (12 - start) // period


def test_warm_up_to_the_plain_mean(close):
    """gamma = power = 1: the mean of t², t = 1..11, is 46."""
    weight = Parameter(torch.zeros(3, dtype=torch.float64))
    regularizers = [EMA(0.9999, warmup="power", power=1.0)]
    optimizer = SGD([weight], lr=1.0, regularizers=regularizers)
    follow(optimizer, weight, [float(t * t) for t in range(1, 12)])
    close(optimizer.state[weight]["ema"], torch.full_like(weight, 46.0))


@pytest.mark.parametrize(
    "power, decay, updates", ((2 / 3, 0.999, 31_622), (2 / 3, 0.9999, 10**6), (0.75, 0.999, 10**4))
)
def test_how_long_a_warm_up_takes(power, decay, updates):
    average = EMA(0.99999, warmup="power", power=power)
    assert 1 - average.weight(updates + 2) >= decay > 1 - average.weight(updates - 10)


def test_every_so_many_steps_while_the_device_counts(backend, close):
    """`capturable`: nobody on the host knows when it is time."""
    results = []
    for capturable in (False, True):
        generator = torch.Generator().manual_seed(0)
        weights = [Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(2)]
        regularizers = [SlowWeights(3, 0.5, "pullback"), SWA(2, 2), EMA(0.5, every=2)]
        optimizer = fastreg.AdamW(weights, lr=0.1, capturable=capturable, regularizers=regularizers)
        for step in range(7):
            for p in weights:
                p.grad = torch.randn(5, generator=generator, dtype=torch.float64)
            if step == 1:
                weights[1].grad = None
            optimizer.step()
        names = ("slow", "slow_momentum", "swa", "ema", "exp_avg")
        results.append([t for p in weights for t in (p, *(optimizer.state[p][name] for name in names))])
    close(*results)


@pytest.mark.parametrize("decay", (0.5, 0.999, 0.9999))
def test_constant_weights_keep_their_bits(decay, backend):
    generator = torch.Generator().manual_seed(0)
    weight = Parameter(torch.randn(257, generator=generator))
    start = weight.detach().clone()
    optimizer = SGD([weight], lr=0.0, regularizers=[EMA(decay), SWA()])
    weight.grad = torch.randn(257, generator=generator)
    with fastreg.use_backend("reference") if backend == "triton" else fastreg.use_backend(backend):
        for _ in range(1000):
            optimizer.step()
    for name in ("ema", "swa"):
        assert torch.equal(optimizer.state[weight][name], start)


@pytest.mark.slow(decay=0.999)
@pytest.mark.parametrize("decay, expected", ((0.999, 1.999955), (0.9999, 1.632139)))
def test_averages_of_bfloat16_arrive(decay, expected, close):
    """From 1 towards 2 in 10 000 updates; a bfloat16 average stays at 1, a plain float32 one at 1.99994."""
    weight = Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = SGD([weight], lr=0.0, regularizers=[EMA(decay)])
    weight.grad = torch.zeros_like(weight)
    optimizer.state[weight]["ema"] = torch.ones(1)
    with torch.no_grad():
        weight.fill_(2.0)
    for _ in range(10_000):
        optimizer.step()
    average = optimizer.state[weight]["ema"]
    assert average.dtype == torch.float32
    assert 2 - decay**10_000 == pytest.approx(expected, abs=5e-7)
    close(average, torch.tensor([2 - decay**10_000]))


def test_float32_averages_do_not_stall():
    """Weights that drift by 1e-8 a step, with noise: ten times nearer to float64 than plain float32 comes."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(512, generator=generator)
    weight = Parameter(start.clone())
    optimizer = SGD([weight], lr=0.0, regularizers=[EMA(0.9999)])
    weight.grad = torch.zeros_like(weight)
    optimizer.state[weight]["ema"] = start.clone()
    expected, plain = start.double(), start.clone()
    for step in range(10_000):
        with torch.no_grad():
            weight.copy_(start + 1e-5 * torch.randn(512, generator=generator) + 1e-8 * step)
        optimizer.step()
        expected += 1e-4 * (weight.detach().double() - expected)
        plain += 1e-4 * (weight.detach() - plain)
    error, stalled = ((t - expected).abs().max().item() for t in (optimizer.state[weight]["ema"], plain))
    assert 10 * error < stalled


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_eval_and_train(dtype, Race):
    race = Race(dtype=dtype)
    optimizer = fastreg.AdamW(race.ours, lr=0.1, regularizers=[EMA(0.5), SWA(2)])
    for _ in range(3):
        race.gradients()
        optimizer.step()
    trained = [p.detach().clone() for p in race.ours]
    averages = [optimizer.state[p]["ema"].clone() for p in race.ours]
    places = [p.data_ptr() for p in race.ours]
    memory = {t.untyped_storage().data_ptr() for p in race.ours for t in optimizer.state[p].values()}
    optimizer.train()
    for _ in range(2):
        optimizer.eval()
        versions = [p._version for p in race.ours]
        optimizer.eval()
        assert [p._version for p in race.ours] == versions  # nothing to do: nothing done
        assert all(torch.equal(p, a.to(dtype)) for p, a in zip(race.ours, averages, strict=True))
        storages = {t.untyped_storage().data_ptr() for p in race.ours for t in optimizer.state[p].values()}
        if dtype == torch.float32:
            assert storages <= memory | {p.untyped_storage().data_ptr() for p in race.ours}  # no copy is kept
        with pytest.raises(RuntimeError, match=r"call optimizer.train\(\) first"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="swapped in already"), optimizer.averaged():
            pass
        optimizer.train()
        optimizer.train()
        assert all(map(torch.equal, race.ours, trained))
    assert [p.data_ptr() for p in race.ours] == places
    assert all(torch.equal(optimizer.state[p]["ema"], a) for p, a in zip(race.ours, averages, strict=True))
    with optimizer.averaged("swa"):
        assert all(torch.equal(p, optimizer.state[p]["swa"].to(dtype)) for p in race.ours)
        with pytest.raises(RuntimeError, match="inside `with optimizer.averaged"):
            optimizer.train()
    assert all(map(torch.equal, race.ours, trained))


def test_eval_without_an_average_does_nothing(Race):
    race = Race()
    optimizer = SGD(race.ours, lr=0.1)
    optimizer.eval()
    race.gradients()
    optimizer.step()
    optimizer.train()


def test_an_average_that_has_not_started_is_not_shown(Race):
    race = Race()
    optimizer = SGD(race.ours, lr=0.1, regularizers=[SWA(start=3)])
    for _ in range(3):
        race.gradients()
        optimizer.step()
        trained = [p.detach().clone() for p in race.ours]
        with optimizer.averaged():
            assert all(map(torch.equal, race.ours, trained))  # at step 3, the mean of one
    race.gradients()
    optimizer.step()
    with optimizer.averaged():
        assert not any(map(torch.equal, race.ours, trained))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shown", (False, True))
@pytest.mark.parametrize("regularizers", ("ema", "swa"))
def test_resumed_in_either_mode(regularizers, shown, dtype, Race, tmp_path):
    """A checkpoint of model and optimizer goes on with the same bits, saved while training or evaluating."""

    def make(parameters):
        chosen = [EMA(0.9, every=2), SWA(2, 2)] if regularizers == "ema" else [SWA(2, 2), EMA(0.9)]
        return fastreg.AdamW(parameters, lr=0.1, regularizers=chosen)

    race = Race(dtype=dtype)
    optimizer = make(race.ours)
    for _ in range(3):
        race.gradients()
        optimizer.step()
    if shown:
        optimizer.eval()
    torch.save(([p.detach() for p in race.ours], optimizer.state_dict()), tmp_path / "checkpoint")
    weights, state = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed = make(parameters := [Parameter(weight) for weight in weights])
    resumed.load_state_dict(state)
    for each in (optimizer, resumed):
        each.train()
    for _ in range(3):
        race.gradients()
        for p, q in zip(race.ours, parameters, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        resumed.step()
    for p, q in zip(race.ours, parameters, strict=True):
        assert torch.equal(p, q)
        for name in optimizer.state[p]:
            assert torch.equal(optimizer.state[p][name], resumed.state[q][name])


def test_a_checkpoint_of_training_ends_evaluation(trained):
    """What is loaded is trained on, though the optimizer that loads it was being evaluated."""
    optimizer, parameters = trained
    weights, state = [p.detach().clone() for p in parameters], optimizer.state_dict()
    state = {**state, "state": {i: dict(values) for i, values in state["state"].items()}}
    averages = [values["ema"].clone() for values in state["state"].values()]
    for values in state["state"].values():
        values["ema"] = values["ema"].clone()
    optimizer.eval()
    optimizer.load_state_dict(state)
    with torch.no_grad():
        for p, weight in zip(parameters, weights, strict=True):
            p.copy_(weight)
    optimizer.step()
    optimizer.eval()
    assert not any(map(torch.equal, parameters, averages))


def test_buffers_of_modules(close):
    """Averaged like the weights, swapped with them, saved with them; what counts is copied."""

    def batches():
        return torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(0))

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    expected = [b.detach().clone() for b in model.buffers()]
    optimizer = SGD(model.parameters(), lr=0.1, regularizers=[EMA(0.5, buffers=model.buffers())])
    for batch in batches():
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()
        for mean, b in zip(expected, model.buffers(), strict=True):
            mean.copy_(mean + 0.5 * (b - mean) if b.is_floating_point() else b)
    kept = [b.clone() for b in model.buffers()]
    optimizer.eval()
    close([b.double() for b in model.buffers()], [b.double() for b in expected])
    assert not torch.equal(model[1].running_mean, kept[0])
    twin = copy.deepcopy(model)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.train()
    assert all(map(torch.equal, model.buffers(), kept))
    assert int(model[1].num_batches_tracked) == 4
    resumed = SGD(twin.parameters(), lr=0.1, regularizers=[EMA(0.5, buffers=twin.buffers())])
    resumed.load_state_dict(state)
    resumed.train()
    assert all(map(torch.equal, twin.buffers(), kept))
    resumed.eval()
    close([b.double() for b in twin.buffers()], [b.double() for b in expected])
    other = torch.nn.BatchNorm1d(7)
    stranger = SGD(twin.parameters(), lr=0.1, regularizers=[EMA(0.5, buffers=other.buffers())])
    with pytest.raises(ValueError, match="saved averages are of 3 buffers"):
        stranger.load_state_dict(state)


@pytest.mark.parametrize(
    "make, message",
    (
        (lambda: EMA(1.0), r"decay must be in \[0, 1\), got decay=1.0"),
        (lambda: EMA(0.9, warmup="linear"), "warmup must be one of None, 'ratio', 'power', got 'linear'"),
        (lambda: EMA(0.9, every=0), "every must be a whole number >= 1, got every=0"),
        (lambda: EMA(0.9, start=-1), "start must be a whole number >= 0, got start=-1"),
        (lambda: EMA(0.9, min_decay=0.95), "min_decay must be in"),
        (lambda: EMA(0.9, warmup="power", gamma=0), "gamma must be finite and > 0"),
        (lambda: SWA(0), "start must be a whole number >= 1, got start=0"),
        (lambda: SWA(every=1.5), "got every=1.5"),
        (lambda: SlowWeights(0), "k must be a whole number"),
    ),
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


DUPLICATES = {
    "clip": ([ClipNorm(1.0), ClipNorm(2.0)], "'ClipNorm' is given more than once"),
    "noise": ([GradientNoise(0.1), GradientNoise(0.1)], "'GradientNoise' is given more than once"),
    "average": ([EMA(0.9), EMA(0.99)], "'ema' is given more than once.*name="),
    "named averages": ([EMA(0.9, "a"), EMA(0.99, "a")], "'a' is given more than once"),
    "the rule's state": ([EMA(0.9, "exp_avg")], "'exp_avg'.*name"),
    "the step count": ([EMA(0.9, "step")], "'step'.*name"),
}


@pytest.mark.parametrize("case", DUPLICATES)
def test_duplicates(case):
    regularizers, message = DUPLICATES[case]
    with pytest.raises(ValueError, match=message):
        fastreg.AdamW([Parameter(torch.ones(1))], regularizers=regularizers)
