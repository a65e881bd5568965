"""One graph, whole, whatever the rates of modules become; and few where they are Python floats."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastreg.layerwise import DropoutScheduler, remove, set_dropout
from fastreg.layerwise.inputs import candidates
from fastreg.schedules import Linear, LinearLayers


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, backend="aot_eager"):
    counter = CompileCounterWithBackend(backend)
    _, kwargs = next(candidates(model))
    forward = torch.compile(model.train(), backend=counter, fullgraph=True)
    return counter, lambda: forward(**kwargs, use_cache=False).logits


@pytest.mark.parametrize("name", ("llama", "gpt2"))
def test_annealing_is_one_graph(make, name):
    model = make(name)
    set_dropout(model, {"attention": 0.0, **({"embedding": 0.0} if name == "gpt2" else {})})
    scheduler = DropoutScheduler(model, Linear(1.0, steps=12), layers=LinearLayers(0.1, 0.1), inject=True)
    counter, forward = compiled(model)
    seen = []
    for _ in range(13):
        torch.manual_seed(0)
        logits = forward()
        logits.square().mean().backward()
        seen.append(logits.detach())
        scheduler.step()
    assert counter.frame_count == 1
    # Rates do change what it computes, down to no dropout at all.
    assert all(not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))
    assert torch.equal(seen[-1], forward())
    with torch.no_grad():
        torch.testing.assert_close(seen[-1], model.eval()(**next(candidates(model))[1]).logits)


@pytest.mark.slow
def test_attention_is_a_few_graphs(make):
    """One for each level, within the 8 that torch compiles before fullgraph makes it an error."""
    model = make("llama")
    scheduler = DropoutScheduler(model, Linear(0.5, 0.1, 60), "attention")
    counter, forward = compiled(model, "eager")  # others are called twice where a float first changes
    for _ in range(70):
        forward()
        scheduler.step()
    assert counter.frame_count == 7


def test_removal_after_compilation(make):
    model = make("llama")
    set_dropout(model, 0.5, inject=True)
    _, forward = compiled(model)
    first = forward()
    remove(model)
    expected = model.eval()(**next(candidates(model))[1]).logits
    model.train()
    torch.testing.assert_close(forward(), expected)
    assert not torch.equal(first, expected)


def test_setting_a_compiled_model(make):
    model = make("gpt2")
    wrapped = torch.compile(model, backend="eager")
    table = set_dropout(wrapped, 0.25)
    assert [row.path.split(".")[0] for row in table] == ["transformer"] * 6
    assert model.transformer.h[0].mlp.dropout.p == 0.25
