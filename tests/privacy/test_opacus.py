"""Against Opacus: the same steps without noise, the same history of the accountant, its engine and all."""

import copy
import io
import math
import warnings

import pytest
import torch
from opacus import GradSampleModule
from opacus import PrivacyEngine as Stock
from opacus.optimizers import DPOptimizer as StockOptimizer
from opacus.schedulers import ExponentialGradClip, ExponentialNoise
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastreg
from fastreg.privacy import PrivacyEngine
from fastreg.privacy.noise import PrivateNoise
from fastreg.privacy.opacus import OpacusDPOptimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:noise_seed"),
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook"),
]

STEPS, C = 8, 0.8
LAYERS = [0.3, 0.5, 0.4, 0.2]
BASES = {
    "AdamW": (lambda ps: torch.optim.AdamW(ps, lr=1e-2), lambda ps: fastreg.AdamW(ps, lr=1e-2)),
    "SGD": tuple(
        lambda ps, make=make: make(ps, lr=0.1, momentum=0.9) for make in (torch.optim.SGD, fastreg.SGD)
    ),
}


def data():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(40, 6, generator=generator), torch.randint(0, 3, (40,), generator=generator)
    )


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


class Run:
    """Training through an engine of Opacus."""

    def __init__(
        self,
        engine,
        base,
        clipping="flat",
        reduction="mean",
        poisson=False,
        sigma=0.0,
        mode="hooks",
        **options,
    ):
        self.engine = engine(accountant="rdp")
        self.model, model = (network(),) * 2
        bound = LAYERS if clipping == "per_layer" else C
        criterion = nn.CrossEntropyLoss(reduction=reduction)
        made = self.engine.make_private(
            module=model, optimizer=base(model.parameters()), data_loader=DataLoader(data(), batch_size=8),
            noise_multiplier=sigma, max_grad_norm=bound, poisson_sampling=poisson, clipping=clipping,
            loss_reduction=reduction, grad_sample_mode=mode, criterion=criterion,
            **options,
        )  # fmt: skip
        self.module, self.optimizer, self.loader = made[0], made[1], made[-1]
        self.criterion = made[2] if mode == "ghost" else criterion
        self.sizes = []

    def train(self, physical=None, steps=STEPS, loader=None, after=lambda: None):
        torch.manual_seed(5)
        if physical is not None:
            with BatchMemoryManager(
                data_loader=self.loader, max_physical_batch_size=physical, optimizer=self.optimizer
            ) as split:
                return self.train(loader=split, steps=steps, after=after)
        loader = self.loader if loader is None else loader
        while steps > 0:
            for x, y in loader:
                self.optimizer.zero_grad()
                self.criterion(self.module(x), y).backward()
                self.optimizer.step()
                self.sizes.append(len(x))
                after()
                steps -= not self.optimizer._is_last_step_skipped
                if not steps:
                    break
        return self

    @property
    def weights(self):
        return [p.detach() for p in self.model.parameters()]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("how", ["plain", "parts", "poisson", "poisson in parts"])
def test_the_same_steps(base, reduction, clipping, how, close):
    """Around a fastreg optimizer, fused, and around one of torch's."""
    options = {"clipping": clipping, "reduction": reduction, "poisson": how.startswith("poisson")}
    physical = 5 if how.endswith("parts") else None
    theirs, ours = BASES[base]
    expected = Run(Stock, theirs, **options).train(physical)
    for make in (ours, theirs) if base == "SGD" else (ours,):
        run = Run(PrivacyEngine, make, **options).train(physical)
        assert isinstance(run.optimizer, OpacusDPOptimizer) and isinstance(run.optimizer, StockOptimizer)
        assert run.sizes == expected.sizes
        close(run.weights, expected.weights)
        assert run.engine.accountant.history == expected.engine.accountant.history
        assert sum(count for *_, count in run.engine.accountant.history) == STEPS


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_an_empty_batch(clipping, close):
    """Nothing but noise, accounted for; here without any."""
    runs = [Run(engine, BASES["AdamW"][0], clipping) for engine in (Stock, PrivacyEngine)]
    (x, y), *_ = runs[0].loader
    for run in runs:
        run.train(loader=[(x, y), (x[:0], y[:0]), (x, y)], steps=3)
    close(runs[1].weights, runs[0].weights)
    assert [count for *_, count in runs[1].engine.accountant.history] == [3]


@pytest.mark.parametrize("physical", [None, 3])
@pytest.mark.parametrize("fused", [False, True])
def test_ghost_clipping(physical, fused, close):
    options = {"mode": "ghost"}
    expected = Run(Stock, BASES["AdamW"][0], **options).train(physical)
    run = Run(PrivacyEngine, BASES["AdamW"][fused], **options).train(physical)
    close(run.weights, expected.weights)
    assert run.engine.accountant.history == expected.engine.accountant.history


@pytest.mark.parametrize("poisson", [False, True])
def test_bookkeeping_takes_the_same_steps(poisson, close):
    """Without any of Opacus: large gradients, where both clip to the same within 1e-6."""
    expected = Run(Stock, BASES["SGD"][0], poisson=poisson, reduction="sum")
    model = network()
    optimizer = fastreg.DPOptimizer(
        BASES["SGD"][1](model.parameters()), model=model, noise_multiplier=0.0, max_grad_norm=1e-3,
        loss_reduction="sum",
    )  # fmt: skip
    expected.optimizer.max_grad_norm = 1e-3
    torch.manual_seed(5)
    batches = [(1e3 * x, y) for x, y in expected.loader]
    for x, y in batches:
        if len(x):
            nn.CrossEntropyLoss(reduction="sum")(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected.train(loader=batches, steps=len(batches))
    close([p.detach() for p in model.parameters()], expected.weights)


def test_accumulated_batches(close):
    """Two backward passes before a step: two batches by Opacus' reckoning, of twice the sampling rate."""
    runs = [Run(engine, BASES["SGD"][0], sigma=0.0) for engine in (Stock, PrivacyEngine)]
    batches = list(runs[0].loader)
    for run in runs:
        for x, y in batches[:2]:
            run.criterion(run.module(x), y).backward()
        assert run.optimizer.accumulated_iterations == 2
        run.optimizer.step()
        run.optimizer.zero_grad()
    close(runs[1].weights, runs[0].weights)
    assert runs[1].engine.accountant.history == runs[0].engine.accountant.history == [(0.0, 0.4, 1)]


def test_schedulers_of_noise_and_clipping(close):
    """Changed between steps: what the kernel uses is what the accountant sees."""
    runs = [Run(engine, BASES["SGD"][0], sigma=2.0) for engine in (Stock, PrivacyEngine)]
    seen = []
    for run in runs:
        noise = ExponentialNoise(run.optimizer, gamma=0.9)
        clip = ExponentialGradClip(run.optimizer, gamma=0.5)
        run.train(after=lambda noise=noise, clip=clip: (noise.step(), clip.step()))
        seen.append(
            (run.engine.accountant.history, run.optimizer.noise_multiplier, run.optimizer.max_grad_norm)
        )
    assert seen[0] == seen[1] and len(seen[0][0]) == STEPS
    assert math.isclose(seen[1][2], C * 0.5**STEPS)


@pytest.mark.parametrize("fused", [False, True])
def test_noise_follows_its_scheduler(fused, monkeypatch):
    run = Run(PrivacyEngine, BASES["SGD"][fused], sigma=2.0)
    used, authorize = [], PrivateNoise.authorize_step
    monkeypatch.setattr(
        PrivateNoise, "authorize_step", lambda *args: used.append(args[1:]) or authorize(*args)
    )
    scheduler = ExponentialNoise(run.optimizer, gamma=0.5)
    run.train(steps=3, after=scheduler.step)
    expected = [(2.0 * 0.5**i * C, 1 / 8, i) for i in range(3)]
    assert [entry for entry in used if entry[0]] == expected
    assert [sigma for sigma, *_ in run.engine.accountant.history] == [2.0, 1.0, 0.5]


def test_learning_rate_schedulers_and_hooks():
    """Opacus' own optimizer has no hooks."""
    run = Run(PrivacyEngine, BASES["SGD"][1], sigma=1.0)
    calls = []
    run.optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    run.optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.step.*")
        run.train(steps=2, after=scheduler.step)
    assert calls == ["pre", "post"] * 2 and run.optimizer.param_groups[0]["lr"] == 0.1 * 0.25


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_samples_are_there_for_the_step_hook(fused):
    run = Run(PrivacyEngine, BASES["SGD"][fused], sigma=1.0)
    seen = []
    hook = run.optimizer.step_hook
    run.optimizer.attach_step_hook(lambda o: (hook(o), seen.append([len(g) for g in o.grad_samples])))
    run.train(steps=1)
    assert seen == [[8] * 4]


def test_pre_step_leaves_the_noised_gradient(close):
    """What Lightning and distributed optimizers call; then the base optimizer steps by itself, once."""
    for fused in (0, 1):
        whole, parts = (
            Run(
                PrivacyEngine,
                BASES["AdamW"][fused],
                sigma=1.0,
                noise_generator=torch.Generator().manual_seed(3),
            )
            for _ in range(2)
        )
        whole.train(steps=2)
        parts.optimizer.step = lambda run=parts: (
            run.optimizer.pre_step() and run.optimizer.original_optimizer.step()
        )
        parts.train(steps=2)
        close(parts.weights, whole.weights)
    with pytest.raises(RuntimeError, match="not private"):
        parts.optimizer.original_optimizer.step()


@pytest.mark.parametrize("fused, materialize", [(0, False), (1, True), (1, False)])
def test_what_is_in_the_gradient_afterwards(fused, materialize):
    """The noised gradient, or nothing; never what is not private."""
    run = Run(PrivacyEngine, BASES["SGD"][fused], sigma=1.0, materialize_grad=materialize)
    before = [w.clone() for w in run.weights]
    run.train(steps=1)
    for p, old in zip(run.model.parameters(), before, strict=True):
        assert p.summed_grad is None
        if fused and not materialize:
            assert p.grad is None
        else:
            torch.testing.assert_close(old - 0.1 * p.grad, p.detach())


def test_making_private_again(close):
    """The engine unwraps what it is given; the component in the base optimizer is that of the new one."""
    run = Run(PrivacyEngine, BASES["SGD"][1])
    first = run.optimizer
    _, second, _ = run.engine.make_private(
        module=run.module, optimizer=first, data_loader=run.loader, noise_multiplier=0.0, max_grad_norm=C,
        poisson_sampling=False,
    )  # fmt: skip
    assert second.original_optimizer is first.original_optimizer
    run.optimizer = second
    close(run.train().weights, Run(Stock, BASES["SGD"][0]).train().weights)


def test_by_hand(close):
    """Without an engine: `GradSampleModule`, and the accountant's hook or the optimizer's own accountant."""
    expected = Run(Stock, BASES["AdamW"][0]).train(steps=3)
    model = network()
    module = GradSampleModule(model)
    optimizer = fastreg.DPOptimizer(
        BASES["AdamW"][1](model.parameters()), noise_multiplier=0.0, max_grad_norm=C, expected_batch_size=8,
        accountant="rdp", sample_rate=0.2,
    )  # fmt: skip
    for x, y in list(expected.loader)[:3]:
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    close([p.detach() for p in model.parameters()], expected.weights)
    assert optimizer.accountant.history == expected.engine.accountant.history


def test_checkpoints_of_the_engine(close):
    """Model, optimizer and accountant exactly, and noise of its own."""
    run = Run(PrivacyEngine, BASES["AdamW"][1], sigma=1.0).train(steps=2)
    file = io.BytesIO()
    run.engine.save_checkpoint(path=file, module=run.module, optimizer=run.optimizer)
    outcomes = []
    for _ in range(2):
        file.seek(0)
        other = Run(PrivacyEngine, BASES["AdamW"][1], sigma=1.0)
        other.engine.load_checkpoint(path=file, module=other.module, optimizer=other.optimizer)
        close(other.weights, run.weights)
        assert other.engine.accountant.history == run.engine.accountant.history
        before = copy.deepcopy(other.optimizer.state_dict()["state"])
        expected = run.optimizer.state_dict()["state"]
        assert all(torch.equal(before[i][name], expected[i][name]) for i in expected for name in expected[i])
        outcomes.append(other.train(steps=1).weights[0].clone())
    assert not torch.equal(*outcomes)


def test_16_bit_parameters():
    """Sums in float32, one rounding: the step of float32 weights to half a unit in the last place."""
    wide = Run(PrivacyEngine, lambda ps: fastreg.SGD(ps, lr=1.0), sigma=0.0)
    narrow = Run(PrivacyEngine, lambda ps: fastreg.SGD(ps, lr=1.0, bf16="nearest"), sigma=0.0)
    for p, q in zip(wide.model.parameters(), narrow.model.parameters(), strict=True):
        p.data = p.data.bfloat16().float()
        q.data = q.data.bfloat16()
        q.grad_sample = p.grad_sample = None
        generator = torch.Generator().manual_seed(0)
        q.grad_sample = torch.randn(8, *p.shape, generator=generator).bfloat16()
        p.grad_sample = q.grad_sample.float()
    for run in (wide, narrow):
        run.optimizer.step()
    for p, q in zip(wide.weights, narrow.weights, strict=True):
        assert q.dtype == torch.bfloat16 and torch.equal(p.bfloat16(), q)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sample_that_is_not_finite(bad, close):
    """Opacus' step makes every weight NaN."""
    (x, y), *_ = DataLoader(data(), batch_size=8)
    runs = [Run(PrivacyEngine, BASES["SGD"][1]) for _ in range(2)]
    runs[0].train(loader=[(x[1:], y[1:])], steps=1)
    x = x.clone()
    x[0, 2] = bad
    runs[1].train(loader=[(x, y)], steps=1)
    close(runs[1].weights, runs[0].weights)
    assert runs[1].optimizer._source.clipped[0].factors[0, 0] == 0


# Refusals


def test_refuses_what_it_does_not_do():
    model = network()
    base = torch.optim.SGD(model.parameters(), 0.1)
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 8}
    with pytest.raises(ValueError, match="secure_mode"):
        OpacusDPOptimizer(base, **options, secure_mode=True)
    with pytest.raises(ValueError, match="ghost"):
        OpacusDPOptimizer(base, **options, clipping="per_layer", grad_sample_mode="ghost")
    with pytest.raises(ValueError, match="adaptive"):
        PrivacyEngine()._prepare_optimizer(optimizer=base, **options, clipping="adaptive")
    with pytest.raises(ValueError, match="one number or 4"):
        OpacusDPOptimizer(base, **{**options, "max_grad_norm": [1.0, 2.0]}, clipping="per_layer")
    with pytest.raises(ValueError, match="expected_batch_size"):
        OpacusDPOptimizer(base, **{**options, "expected_batch_size": None})
    with pytest.raises(NotImplementedError, match="pre_step"):
        OpacusDPOptimizer(base, **options).add_noise()


def test_refuses_gradients_that_have_been_used():
    run = Run(PrivacyEngine, BASES["SGD"][1], sigma=1.0)
    run.train(steps=1)
    with pytest.raises(RuntimeError, match="zero_grad"):
        run.optimizer.step()


def test_names_the_parameter_that_no_sample_has_a_gradient_of():
    model = network()
    model.spare = nn.Linear(2, 2)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    module = GradSampleModule(model)
    optimizer = fastreg.DPOptimizer(torch.optim.SGD(model.named_parameters(), 0.1), expected_batch_size=8)
    nn.functional.cross_entropy(module(torch.randn(8, 6)), torch.zeros(8).long()).backward()
    with pytest.raises(ValueError, match="'spare.weight' is trainable"):
        optimizer.step()
