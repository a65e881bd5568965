"""Fused modules in the place of torch's, and the memory that this saves."""

import pytest
from torch import nn

import fastreg.nn


def test_every_dropout_is_replaced():
    shared = nn.Dropout(0.3, inplace=True)
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.Sequential(nn.Dropout2d(0.2), nn.Identity()), shared)
    model.eval()
    keys = list(model.state_dict())
    assert fastreg.nn.replace_dropout(model) is model
    assert type(model[1]) is fastreg.nn.Dropout and model[1].p == 0.3 and model[1].inplace
    assert model[3] is model[1] and type(model[2][0]) is fastreg.nn.Dropout2d and model[2][0].p == 0.2
    assert not any(module.training for module in model.modules()) and list(model.state_dict()) == keys
    before = list(model.modules())
    assert list(fastreg.nn.replace_dropout(model).modules()) == before


def test_activation_memory_of_gpt2(capsys):
    """Twelve layers keep as many bytes less as masks have: on a CPU those are of the activations' dtype."""
    pytest.importorskip("transformers")
    activation = pytest.importorskip("fastreg_benchmarks.activation")
    torchs, ours = activation.activation_memory(columns=32)
    assert torchs["layers"] == 12 and torchs["dropped"] == 32 * 768 * 25
    seeds_and_thresholds = 12 * 25
    assert torchs["bytes"] - ours["bytes"] == 4 * torchs["dropped"] - seeds_and_thresholds
