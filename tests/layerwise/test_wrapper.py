"""The wrapper looks like the model inside."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastreg.layerwise import LayerwiseAdaptiveRegularization, assert_dropout, audit, restore
from fastreg.layerwise.inputs import candidates
from fastreg.schedules import LinearLayers


def test_every_family(family, run):
    kind, model = family
    keys, expected = list(model.state_dict()), run(model, training=False)
    names = [name for name, _ in model.named_parameters()]
    if "p" in kind.roles and "h" not in kind.roles:  # convolutions and nothing else
        with pytest.raises(ValueError, match="no attention or MLP in repeated layers"):
            LayerwiseAdaptiveRegularization(model)
        return
    wrapper = LayerwiseAdaptiveRegularization(model, max(kind.layers), 0.2, 0.05)
    assert_dropout(wrapper, LinearLayers(0.2, 0.05))
    assert {row.role for row in wrapper.table} == {"hidden"}
    assert list(wrapper.state_dict()) == keys
    assert [name for name, _ in wrapper.named_parameters()] == names
    args, kwargs = next(candidates(model))
    with torch.no_grad():
        output = wrapper.eval()(*args, **kwargs).to_tuple()
    assert torch.equal(
        next(x for x in output if isinstance(x, torch.Tensor) and x.is_floating_point()), expected[0]
    )


def test_defaults(make):
    wrapper = LayerwiseAdaptiveRegularization(make("gpt2"))
    assert [row.rate for row in wrapper.table][::2] == [0.1, 0.12000000000000001, 0.14]


@pytest.mark.parametrize(("name", "count"), (("llama", 3), ("t5", 3), ("swin", 3)))
def test_a_wrong_number_of_layers(make, name, count):
    with pytest.raises(ValueError, match=f"has {count} layers, got num_layers=12: give {count} or None"):
        LayerwiseAdaptiveRegularization(make(name), 12)


def test_errors(make):
    with pytest.raises(ValueError, match="found no repeated layers in Linear"):
        LayerwiseAdaptiveRegularization(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="give 1.5 at layer 2"):
        LayerwiseAdaptiveRegularization(make("gpt2"), None, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"base must be in \[0, 1\], got base=2"):
        LayerwiseAdaptiveRegularization(make("gpt2"), base_dropout=2)


def test_what_the_wrapper_does_not_have_is_taken_from_inside(make):
    model = make("gpt2")
    wrapper = LayerwiseAdaptiveRegularization(model)
    assert wrapper.config is model.config and wrapper.base_model is model and wrapper.device == model.device
    tokens = torch.tensor([[5, 6, 7]])
    generated = wrapper.generate(input_ids=tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False))
    assert wrapper.gradient_checkpointing_enable == model.gradient_checkpointing_enable
    assert wrapper.get_input_embeddings() is model.transformer.wte
    with pytest.raises(AttributeError, match="no_such_thing"):
        wrapper.no_such_thing  # noqa: B018


def test_it_trains(make):
    wrapper = LayerwiseAdaptiveRegularization(make("llama")).train()
    assert wrapper.base_model.model.layers[2].mlp.fastreg_dropout.training
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    tokens = torch.tensor([[5, 6, 7, 8]])
    losses = []
    for _ in range(5):
        loss = wrapper(tokens, labels=tokens).loss  # by position and by name
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert len(list(wrapper.parameters())) == len(list(wrapper.base_model.parameters()))
    wrapper.to(torch.bfloat16).eval()
    assert wrapper.base_model.lm_head.weight.dtype == torch.bfloat16 and not wrapper.base_model.training


def test_state_dicts_go_both_ways(make, run, tmp_path):
    model, other = make("gpt2"), make("gpt2")
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    wrapper = LayerwiseAdaptiveRegularization(model)
    wrapper.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(wrapper.parameters(), other.parameters(), strict=True))
    make("gpt2").load_state_dict(wrapper.state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*transformer.wte.weight"):
        wrapper.load_state_dict(
            {k: v for k, v in other.state_dict().items() if "wte" not in k and "lm_h" not in k}
        )
    # ... also inside another model
    outer = nn.ModuleDict({"inner": wrapper})
    keys = [f"inner.{key}" for key in model.state_dict()]
    assert list(outer.state_dict()) == keys
    outer.load_state_dict(outer.state_dict())
    wrapper.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    restore(loaded)
    assert_dropout(loaded, wrapper.table)
    assert all(map(torch.equal, run(loaded, training=True), run(model, training=True)))


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))))
def test_copies(make, copied):
    wrapper = LayerwiseAdaptiveRegularization(make("llama"))
    other = copied(wrapper)
    assert other.table == wrapper.table and list(other.state_dict()) == list(wrapper.state_dict())
    assert_dropout(other, wrapper.table)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), wrapper.parameters(), strict=True))
    assert other.base_model is not wrapper.base_model


def test_paths_are_those_of_the_model_inside(make):
    wrapper = LayerwiseAdaptiveRegularization(make("gpt2"))
    assert all(site.path.startswith("transformer.") for site in audit(wrapper).sites)
    assert [name for name, _ in wrapper.named_buffers()] == [
        name for name, _ in wrapper.base_model.named_buffers()
    ]
