"""Callbacks in a loop: passes, what is noticed, what is told."""

import pytest
import torch

import fastreg
from fastreg import Regularization
from fastreg.recipe.callbacks import Callbacks


def test_sharpness_aware_steps_take_one_pass_where_none_is_due(tools):
    calls = []
    model = tools.gpt2()
    optimizer, callbacks = Regularization(sam={"rho": 0.1, "interval": 2, "start_step": 0.25}).apply(
        model, lr=0.01, steps=4
    )

    def loss():
        calls.append(1)
        return tools.loss_of(model)()

    counts = []
    for _ in range(4):
        calls.clear()
        callbacks.training_step(loss, optimizer)
        counts.append(len(calls))
    assert counts == [1, 2, 1, 2]


def test_a_step_of_sam_is_two_passes_under_one_watch():
    weight = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        weight.weight.fill_(3.0)
    optimizer, callbacks = Regularization(optimizer="sgd", sam=0.5).apply(weight, lr=0.1)
    seen = []

    def loss():
        seen.append(weight.weight.item())
        return (weight.weight**2).sum() / 2

    class Watch(list):
        def __enter__(self):
            self.append(weight.weight.item())

        def __exit__(self, *_):
            self.append(weight.weight.item())

    watch = Watch()
    assert callbacks.training_step(loss, optimizer, watch=watch).item() == 4.5
    assert seen == [3.0, 3.5] and weight.weight.grad is None
    assert watch == pytest.approx([3.0, 3.5, 3.5, 3.0 - 0.35])


def test_micro_batches_of_sam_add_up(tools):
    """Two halves with perturbations of their own, as `SAM.accumulate` has it."""
    halves = tools.TOKENS[:1], tools.TOKENS[1:2]
    model, other = tools.gpt2(), tools.gpt2()
    optimizer, callbacks = Regularization(optimizer="sgd", sam=0.5).apply(model, lr=0.1)
    for i, half in enumerate(halves):
        callbacks.gradients(lambda half=half: model(input_ids=half, labels=half).loss, accumulate=i == 0)
    optimizer.step()
    reference = fastreg.SAM(other.parameters(), fastreg.SGD, rho=0.5, lr=0.1)
    for half in halves:
        other(input_ids=half, labels=half).loss.backward()
        reference.first_step(zero_grad=True)
        other(input_ids=half, labels=half).loss.backward()
        reference.accumulate()
    reference.step()
    assert all(map(torch.equal, tools.weights(model), tools.weights(other)))


def test_a_step_without_the_passes_it_needs_is_noticed(tools):
    for recipe in ({"adversarial": True}, {"weight_noise": 0.1}, {"r_drop": 1.0}):
        model = tools.gpt2(0.1)
        optimizer, callbacks = Regularization.from_dict(recipe).apply(model, lr=0.1)
        callbacks.step(0)
        callbacks.training_step(tools.loss_of(model), optimizer)
        callbacks.step(1)
        tools.loss_of(model)().backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match="needs passes of its own"):
            callbacks.step(2)


def test_state_of_other_callbacks_is_refused(tools):
    _, callbacks = Regularization(embedding_noise=5).apply(tools.gpt2())
    with pytest.raises(ValueError, match="the state is of the callbacks dropout; these are embedding_noise"):
        callbacks.load_state_dict({"dropout": {}})
    assert isinstance(callbacks, Callbacks) and isinstance(callbacks, list)


def test_a_backward_of_ones_own_is_called(tools):
    model = tools.gpt2()
    _, callbacks = Regularization(adversarial=True).apply(model)
    scaled = []

    def backward(loss):
        scaled.append(loss.item())
        (loss * 2).backward()

    value = callbacks.gradients(tools.loss_of(model), backward=backward)
    assert len(scaled) == 2 and value.item() == scaled[0]
