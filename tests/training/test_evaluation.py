"""Evaluation with the averages of any optimizer, in any wrapper."""

import pytest
import torch
from torch import nn

import fastreg
from fastreg.loops import train_with_weight_decay
from fastreg.training.evaluation import evaluate_with_averages

LR = 0.1


def ema(params):
    return fastreg.AdamW(params, lr=LR, regularizers=[fastreg.EMA(0.9)])


def private(optimizer, model):
    return fastreg.DPOptimizer(
        optimizer, model=model, noise_multiplier=0.0, expected_batch_size=8, loss_reduction="mean"
    )


def accelerated(optimizer):
    return pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(optimizer)


def opacus(optimizer):
    dp = pytest.importorskip("opacus.optimizers").DPOptimizer
    return dp(optimizer, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=8)


OPTIMIZERS = {
    "ema": lambda model: ema(model.parameters()),
    "msam": lambda model: fastreg.AdamW(model.parameters(), lr=LR, regularizers=[fastreg.MSAM(1.0)]),
    "lookahead": lambda model: fastreg.Lookahead(fastreg.SGD(model.parameters(), lr=LR), k=4),
    "lookahead around torch": lambda model: fastreg.Lookahead(torch.optim.SGD(model.parameters(), LR), k=4),
    "lookahead around ema": lambda model: fastreg.Lookahead(ema(model.parameters())),
    "sam around ema": lambda model: fastreg.SAM(
        model.parameters(), fastreg.AdamW, lr=LR, regularizers=[fastreg.EMA(0.9)]
    ),
    "dp around ema": lambda model: private(ema(model.parameters()), model),
    "dp around lookahead": lambda model: private(
        fastreg.Lookahead(torch.optim.SGD(model.parameters(), LR), k=4), model
    ),
    "accelerate": lambda model: accelerated(ema(model.parameters())),
    "accelerate around lookahead": lambda model: accelerated(
        fastreg.Lookahead(torch.optim.SGD(model.parameters(), LR), k=4)
    ),
    "opacus": lambda model: opacus(ema(model.parameters())),
}
"""Optimizers with averages, alone and in wrappers."""

PLAIN = {
    "torch": lambda model: torch.optim.SGD(model.parameters(), LR),
    "sam around torch": lambda model: fastreg.SAM(model.parameters(), torch.optim.SGD, lr=LR),
    "without averages": lambda model: fastreg.AdamW(model.parameters(), lr=LR),
    "accelerate around torch": lambda model: accelerated(torch.optim.SGD(model.parameters(), LR)),
}


def trained(make):
    """Returns a model after three steps, and its optimizer; Opacus' does not clip here."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = make(model)
    for _ in range(3):
        model(torch.randn(8, 4)).square().mean().backward()
        if isinstance(optimizer, fastreg.SAM):
            optimizer.first_step()
        vars(optimizer).get("original_optimizer", optimizer).step()
        optimizer.zero_grad()
    return model, optimizer


def innermost(optimizer):
    """Returns the optimizer inside accelerate's and Opacus' wrappers, which has `averaged()`."""
    for name in ("optimizer", "original_optimizer"):
        optimizer = vars(optimizer).get(name, optimizer)
    return optimizer


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_parameters_hold_their_averages_in_the_block(make):
    model, optimizer = trained(make)
    weight = model.weight.detach().clone()
    with innermost(optimizer).averaged():
        average = model.weight.detach().clone()
    assert not torch.allclose(weight, average, atol=1e-3)
    with evaluate_with_averages(optimizer):
        assert torch.equal(model.weight, average)
        with evaluate_with_averages(optimizer):
            assert torch.equal(model.weight, average)
        assert torch.equal(model.weight, average), "the inner block leaves them"
    assert torch.equal(model.weight, weight)
    with pytest.raises(KeyError), evaluate_with_averages(optimizer):
        raise KeyError
    assert torch.equal(model.weight, weight), "also after an error"


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_without_averages_nothing_happens(make):
    model, optimizer = trained(make)
    weight = model.weight.detach().clone()
    with evaluate_with_averages(optimizer):
        assert torch.equal(model.weight, weight)
    assert torch.equal(model.weight, weight)


def test_other_libraries_averages():
    """Such as those of schedulefree, which have `eval()` and `train()` as well."""

    class ScheduleFree(torch.optim.SGD):
        calls = []

        def eval(self):
            self.calls.append("eval")

        def train(self):
            self.calls.append("train")

    _, optimizer = trained(lambda model: ScheduleFree(model.parameters(), LR))
    with evaluate_with_averages(optimizer):
        assert optimizer.calls == ["eval"]
    assert optimizer.calls == ["eval", "train"]


def test_perturbed_weights_are_refused():
    model, optimizer = trained(OPTIMIZERS["sam around ema"])
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="between first_step"), evaluate_with_averages(optimizer):
        pass


@pytest.mark.parametrize("name", ["ema", "lookahead around torch", "dp around lookahead", "accelerate"])
def test_loops_validate_with_averages(name):
    """The loss after the last epoch is that of the averages, whatever wraps the optimizer."""
    torch.manual_seed(0)
    data = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(6)]
    model = nn.Linear(4, 3)
    history = train_with_weight_decay(
        model, data, lr=LR, optimizer=lambda groups, lr: OPTIMIZERS[name](model), validation=data,
        progress=False,
    )  # fmt: skip

    @torch.no_grad()
    def loss():
        return float(sum(nn.functional.cross_entropy(model(x), y) for x, y in data) / len(data))

    with innermost(history.optimizer).averaged():
        assert history.validation == [pytest.approx(loss(), abs=1e-6)]
    assert abs(history.validation[0] - loss()) > 1e-5


def test_validation_is_the_mean_over_samples_in_evaluation_mode(mlp, loader, digits):
    """After each epoch, with the averages, over batches of different sizes."""
    net = mlp(0.5)
    history = train_with_weight_decay(
        net, loader(), lr=0.05, epochs=2, validation=loader(50, 130), regularizers=[fastreg.EMA(0.9)],
        progress=False,
    )  # fmt: skip
    net.eval()
    x, y = digits[:130]
    with torch.no_grad(), history.optimizer.averaged():
        expected = nn.functional.cross_entropy(net(x), y).item()
    assert len(history.validation) == 2 and history.validation[-1] == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        assert abs(nn.functional.cross_entropy(net(x), y).item() - expected) > 1e-4
