"""DPOptimizer's accounting of steps, and its checkpoints."""

import copy
import io

import pytest
import torch

import fastreg

from .conftest import backward, private, train, weights

pytestmark = pytest.mark.filterwarnings("ignore:noise_seed")

# Accounting


def test_steps_are_accounted_for_exactly():
    """Noise that changes between steps, parts of batches and empty batches."""
    model, optimizer = private(accountant="rdp", sample_rate=0.1)
    train(model, optimizer, 2)
    optimizer.noise_multiplier = 2.0
    backward(model)
    optimizer.accumulate()
    optimizer.zero_grad()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.accountant.history == [(1.0, 0.1, 2), (2.0, 0.1, 2)]
    spent = optimizer.epsilon(1e-5)
    assert spent == optimizer.accountant.get_epsilon(1e-5) and "RDP" in spent.source


def test_an_accountant_without_history():
    class Steps:
        taken = 0

        def step(self, **_):
            self.taken += 1

        def get_epsilon(self, delta):
            return float(self.taken)

    _, optimizer = private(accountant=Steps(), sample_rate=0.1)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.epsilon(1e-5) == 1.0


def test_a_step_is_accounted_for_before_it_is_taken(monkeypatch):
    model, optimizer = private(accountant="rdp", sample_rate=0.1)
    monkeypatch.setattr(fastreg.engine.launch, "run", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, 0.1, 1)]


@pytest.mark.parametrize("name, value", [("noise_multiplier", 0.5), ("max_grad_norm", 2.0)])
def test_a_hook_may_not_change_what_it_accounts_for(name, value):
    model, optimizer = private()
    before = weights(model)
    optimizer.attach_step_hook(lambda o: setattr(o, name, value))
    backward(model)
    with pytest.raises(RuntimeError, match="between steps"):
        optimizer.step()
    assert all(map(torch.equal, weights(model), before))


# Checkpoints


def restored(state, **options):
    model, optimizer = private(**options)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # torch's share what they are given
    return model, optimizer


def saved(model, optimizer):
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("make", [fastreg.AdamW, torch.optim.AdamW])
def test_resuming(make):
    """Weights, moments and history exactly; noise of its own, another at every time."""
    options = {"make": make, "accountant": "rdp", "sample_rate": 0.1, "noise_seed": None}
    model, optimizer = private(**options)
    train(model, optimizer)
    state = saved(model, optimizer)
    assert not any(
        str(optimizer._mechanism.noise.key) in str(group) for group in state["optimizer"]["param_groups"]
    )
    outcomes = []
    for _ in range(2):
        again, other = restored(state, **options)
        assert other.accountant.history == optimizer.accountant.history == [(1.0, 0.1, 3)]
        assert all(map(torch.equal, weights(again), weights(model)))
        for p, q in zip(again.parameters(), model.parameters(), strict=True):
            assert all(torch.equal(other.state[p][name], value) for name, value in optimizer.state[q].items())
        outcomes.append(train(again, other, 1)[0])
        assert other.accountant.history == [(1.0, 0.1, 4)]
    assert not torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], train(model, optimizer, 1)[0])


def test_loading_in_place_renews_the_key():
    """Going back in one process does not go back in the noise."""
    model, optimizer = private(noise_seed=None)
    state = saved(model, optimizer)
    outcomes = []
    for _ in range(2):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        outcomes.append(train(model, optimizer, 1)[0])
    assert not torch.equal(*outcomes)


@pytest.mark.parametrize("make", [fastreg.AdamW, torch.optim.AdamW])
def test_resuming_reproducibly(make):
    options = {"make": make, "noise_seed": None, "reproducible": True}
    model, optimizer = private(**options)
    train(model, optimizer)
    state = saved(model, optimizer)
    expected = train(model, optimizer)
    for _ in range(2):
        assert all(map(torch.equal, train(*restored(state, **options)), expected))
    again, other = restored(state, **{**options, "reproducible": False})
    assert not torch.equal(train(again, other)[0], expected[0])


def test_state_dicts_are_those_of_torch():
    model, optimizer = private()
    train(model, optimizer)
    assert "privacy" not in optimizer.state_dict()["param_groups"][0]
    plain = torch.optim.AdamW(model.parameters())
    plain.load_state_dict(optimizer.state_dict())
    other, fresh = private()
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(fresh.state[other[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])
