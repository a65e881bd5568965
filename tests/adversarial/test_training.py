"""A training step on clean and adversarial inputs, and that it makes a model robust."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastreg
from fastreg.adversarial import adversarial_training, ffgsm, fgsm, pgd


def test_is_the_step_by_hand(model, x, y):
    ours, theirs = model, copy.deepcopy(model)
    for module in (*ours.modules(), *theirs.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    step = adversarial_training(
        ours, x, y, fastreg.SGD(ours.parameters(), lr=0.1), 0.1, alpha=0.3, attack=fgsm, norm="l2"
    )
    inputs = fgsm(theirs, x, y, 0.1, "l2")
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    clean = functional.cross_entropy(theirs(x), y)
    adversarial = functional.cross_entropy(theirs(inputs), y)
    (0.3 * clean + 0.7 * adversarial).backward()
    optimizer.step()
    assert torch.equal(step.inputs, inputs)
    torch.testing.assert_close(step.clean, clean.detach())
    torch.testing.assert_close(step.adversarial, adversarial.detach())
    torch.testing.assert_close(step.loss, 0.3 * step.clean + 0.7 * step.adversarial)
    for p, q in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_modes(model, x, y):
    """The attack in eval mode, the passes in that of each module; a model in eval mode trains and returns."""
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append([m.training for m in module.modules()]))
    before = [m.training for m in model.modules()]
    adversarial_training(model, x, y, None, 0.1)
    count = len(before)
    assert seen == [[False] * count, before, before] and [m.training for m in model.modules()] == before
    model.eval()
    seen.clear()
    adversarial_training(model, x, y, None, 0.1)
    assert seen == [[False] * count, [True] * count, [True] * count]
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("alpha, passes", [(0.0, 2), (1.0, 1), (0.5, 3)])
def test_what_has_no_weight_is_not_computed(model, x, y, alpha, passes):
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    step = adversarial_training(model, x, y, None, 0.1, alpha=alpha)
    assert len(seen) == passes
    assert (step.clean is None) == (alpha == 0) and (step.adversarial is None) == (alpha == 1)
    assert step.inputs is x if alpha == 1 else not torch.equal(step.inputs, x)


def test_gradients_accumulate(x, y):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 3))
    adversarial_training(model, x, y, None, 0.1)
    once = [p.grad.clone() for p in model.parameters()]
    adversarial_training(model, x, y, None, 0.1)
    for p, g in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    adversarial_training(model, x, y, optimizer, 0.1, zero_grad=False)
    for p, g in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 3 * g)
    with torch.no_grad():
        adversarial_training(model, x, y, optimizer, 0.1)
    for p, g in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_grad_scaler(x, y):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(60, 3))
    scaled = copy.deepcopy(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for model, options in ((plain, {}), (scaled, {"scaler": scaler})):
        adversarial_training(model, x, y, fastreg.SGD(model.parameters(), lr=0.1), 0.1, **options)
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert scaler._growth_tracker is not None


def test_a_loss_instead_of_a_model(model, x, y):
    def loss(x, y):
        return functional.cross_entropy(model(x), y, reduction="none")

    before = [m.training for m in model.modules()]
    step = adversarial_training(loss, x, y, None, 0.1, model=model)
    assert torch.equal(step.inputs, fgsm(model, x, y, 0.1))
    assert [m.training for m in model.modules()] == before and step.loss.dim() == 0


def test_errors(model, x, y):
    with pytest.raises(ValueError, match="alpha"):
        adversarial_training(model, x, y, None, 0.1, alpha=1.5)


def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    return x[:1400], y[:1400], x[1400:], y[1400:]


def accuracy(model, x, y):
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize("attack, options", [(ffgsm, {}), (pgd, {"steps": 3})])
def test_makes_a_model_robust(attack, options):
    x, y, held_x, held_y = digits()
    robust = {}
    for epsilon in (0.0, 0.15):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = fastreg.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            for part in torch.randperm(len(x)).split(50):
                alpha = 0.0 if epsilon else 1.0
                adversarial_training(
                    model, x[part], y[part], optimizer, epsilon, alpha=alpha, attack=attack, **options
                )
        model.eval()
        assert accuracy(model, held_x, held_y) > 0.85
        attacked = pgd(model, held_x, held_y, 0.15, generator=torch.Generator().manual_seed(0))
        robust[epsilon] = accuracy(model, attacked, held_y)
    assert robust[0.15] > robust[0.0] + 0.2
