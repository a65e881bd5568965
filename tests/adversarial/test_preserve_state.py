"""Attacks preserve modes, gradients, buffers and random states, also after errors."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastreg.adversarial import ffgsm, fgsm, pgd

ATTACKS = {"fgsm": fgsm, "ffgsm": ffgsm, "pgd": pgd}
ALL = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
MODES = pytest.mark.parametrize("mode", ["eval", "train", "keep"])


def state(model):
    return (
        [module.training for module in model.modules()],
        [
            (p.requires_grad, p.grad is None, p.grad if p.grad is None else p.grad.clone())
            for p in model.parameters()
        ],
        [(name, buffer.clone(), id(buffer)) for name, buffer in model.named_buffers()],
        [p.detach().clone() for p in model.parameters()],
    )


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture
def trained(model, x, y):
    """With gradients, and a parameter that takes none."""
    functional.cross_entropy(model(x), y).backward()
    model[0].bias.requires_grad_(False)
    model[0].bias.grad = None
    return model


@ALL
@MODES
def test_state_is_preserved(trained, x, y, attack, mode):
    before, original = state(trained), x.clone()
    attack(trained, x, y, 0.1, mode=mode)
    assert equal(state(trained), before)
    assert torch.equal(x, original) and not x.requires_grad and x.grad is None


@ALL
@MODES
def test_state_is_preserved_after_an_exception(trained, x, y, attack, mode):
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = trained

        def forward(self, x):
            self.inner(x)
            torch.rand(3)
            raise KeyError("inside")

    model = Failing()
    before = state(model)
    torch.manual_seed(1)
    if attack is not fgsm:
        torch.randint(2**62, ())  # drawn by a random start
    random = torch.get_rng_state()
    torch.manual_seed(1)
    with pytest.raises(KeyError, match="inside"):
        attack(model, x, y, 0.1, mode=mode)
    assert equal(state(model), before) and torch.equal(torch.get_rng_state(), random)


def test_modes_during_the_attack(trained, x, y):
    seen = []
    handle = trained.register_forward_pre_hook(
        lambda module, _: seen.append([m.training for m in module.modules()])
    )
    before = [m.training for m in trained.modules()]
    for mode in ("eval", "train", "keep"):
        fgsm(trained, x, y, 0.1, mode=mode)
    handle.remove()
    assert seen == [[False] * len(before), [True] * len(before), before]


def test_train_of_modules_is_not_called(x, y):
    """Modules whose `train()` does more than set the mode, such as merging weights, must not notice."""

    class Merging(nn.Linear):
        def train(self, mode=True):
            raise AssertionError("train() must not be called")

    model = nn.Sequential(nn.Flatten(), Merging(60, 3))
    fgsm(model, x, y, 0.1)
    assert all(module.training for module in model.modules())


def test_model_behind_a_loss(trained, x, y):
    """Of a function the model is not known unless it is named."""

    def loss(x, y):
        return functional.cross_entropy(trained(x), y, reduction="none")

    before = state(trained)
    adversarial = fgsm(loss, x, y, 0.1, model=trained)
    assert equal(state(trained), before) and torch.equal(adversarial, fgsm(trained, x, y, 0.1))


def test_buffers_that_are_replaced(x, y):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(60, 3)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("none", None)

        def forward(self, x):
            self.calls = self.calls + 1
            return self.head(x.flatten(1))

    model = Counting()
    calls = model.calls
    fgsm(model, x, y, 0.1, mode="train")
    assert model.calls is calls and calls == 0


# Random numbers -------------------------------------------------------------------------------------------


def test_without_a_random_start_no_number_is_taken(trained, x, y):
    """Though dropout draws."""
    before = torch.get_rng_state()
    fgsm(trained, x, y, 0.1, mode="train")
    pgd(trained, x, y, 0.1, mode="train", random_start=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_random_start_takes_one_number(trained, x, y):
    torch.manual_seed(1)
    torch.randint(2**62, ())
    expected = torch.get_rng_state()
    for restarts in (1, 3):
        torch.manual_seed(1)
        pgd(trained, x, y, 0.1, mode="train", restarts=restarts)
        assert torch.equal(torch.get_rng_state(), expected)


def test_torch_rules_random_starts(trained, x, y):
    def attack(**options):
        return pgd(trained, x, y, 0.1, 0.01, 2, **options)

    torch.manual_seed(2)
    first, second = attack(), attack()
    torch.manual_seed(2)
    assert torch.equal(attack(), first) and not torch.equal(first, second)
    before = torch.get_rng_state()
    seeded = attack(generator=torch.Generator().manual_seed(4))
    assert torch.equal(seeded, attack(generator=torch.Generator().manual_seed(4)))
    assert torch.equal(torch.get_rng_state(), before) and not torch.equal(seeded, first)


# Wrapped models -------------------------------------------------------------------------------------------


def test_compiled_models(trained, x, y):
    compiled = torch.compile(copy.deepcopy(trained), backend="eager")
    before = state(compiled)
    torch.testing.assert_close(fgsm(compiled, x, y, 0.1), fgsm(trained, x, y, 0.1))
    assert equal(state(compiled), before)
