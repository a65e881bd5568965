"""Noise that is attached to modules of a model by hooks."""

import copy
import math
import re
from typing import NamedTuple

import pytest
import torch
from torch import nn

from fastreg.nn import attach_activation_noise

pytestmark = pytest.mark.usefixtures("reference")


class Pair(nn.Module):
    """Returns a tuple."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x), x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
        self.pair = Pair()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        y, x = self.pair(x)
        return y + x


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("layers.?", ["layers.0", "layers.1", "layers.2"]),
        ("*inner", ["pair.inner"]),
        (re.compile(r"layers\.[12]\.0"), ["layers.1.0", "layers.2.0"]),
        (nn.ReLU, ["layers.0.1", "layers.1.1", "layers.2.1"]),
        ((Pair, nn.Sequential), ["layers.0", "layers.1", "layers.2", "pair"]),
    ],
)
def test_patterns(pattern, names):
    assert sorted(attach_activation_noise(Net(), pattern, 0.1).names) == names


def test_attached_noise_is_on_the_output():
    model, x = Net(), torch.randn(2000, 4)
    clean = model(x)
    with attach_activation_noise(model, "pair", 0.3) as noise:
        z = (model(x) - clean).detach().double() / 0.3
        assert abs(float(z.mean())) * math.sqrt(z.numel()) < 5
        assert abs(float(z.square().mean() - 1)) * math.sqrt(z.numel() / 2) < 5
        noise.std = 0.0
        assert torch.equal(model(x), clean)
        noise.std = 0.1
        assert torch.equal(model.eval()(x), clean) and not torch.equal(model.train()(x), clean)
        model.pair.eval()
        assert torch.equal(model(x), clean)
        model.pair.train()
        assert torch.equal(copy.deepcopy(model).eval()(x), clean)
        assert not torch.equal(copy.deepcopy(model)(x), clean)
    assert torch.equal(model(x), clean) and not model.pair._forward_hooks
    assert set(model.state_dict()) == set(Net().state_dict())
    with pytest.raises(ZeroDivisionError), attach_activation_noise(model, "pair", 0.3):
        raise ZeroDivisionError
    assert torch.equal(model(x), clean)


class Both(NamedTuple):
    first: torch.Tensor
    second: str


@pytest.mark.parametrize("make", [lambda x: [x, "text"], lambda x: Both(x, "text")], ids=("list", "named"))
def test_outputs_keep_their_kind(make):
    class Returns(nn.Module):
        def forward(self, x):
            return make(x)

    model = nn.Sequential(Returns())
    attach_activation_noise(model, "0", 0.3)
    output = model(x := torch.ones(30))
    assert type(output) is type(make(x)) and output[1] == "text" and (output[0] != x).all()


@pytest.mark.parametrize("pattern", ["pair", "layers.1"])
def test_attached_noise_compiles_once(pattern, counting):
    graphs, compiler = counting
    model, x = Net(), torch.randn(30, 4)
    clean = model(x)
    noise = attach_activation_noise(model, pattern, 0.3, "multiplicative")
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for std in (0.3, 0.1, 0.0, 1.0):
        noise.std = std
        torch.manual_seed(0)
        actual = compiled(x)
        torch.manual_seed(0)
        assert torch.equal(actual, model(x)) and torch.equal(actual, clean) == (std == 0)
    assert len(graphs) == 1
    noise.remove()
    noise.std = 0.3  # as a scheduler does that goes on
    assert torch.equal(compiled(x), clean)


def test_attaching_refuses():
    with pytest.raises(ValueError, match=r"'\*.mlp' matches no module of Net; there are: layers, layers.0, "):
        attach_activation_noise(Net(), "*.mlp", 0.1)
    with pytest.raises(ValueError, match="matches no module of Net; there are: Linear, ModuleList, Pair"):
        attach_activation_noise(Net(), nn.GELU, 0.1)
    with pytest.raises(TypeError, match="pattern must be"):
        attach_activation_noise(Net(), 3, 0.1)
    with pytest.raises(ValueError, match="std must be finite"):
        attach_activation_noise(Net(), "pair", -1.0)

    class ReturnsDict(nn.Module):
        def forward(self, x):
            return {"x": x}

    model = nn.Sequential(ReturnsDict())
    attach_activation_noise(model, "0", 0.1)
    with pytest.raises(TypeError, match="output of ReturnsDict must be a tensor.* got dict; choose a module"):
        model(torch.ones(3))


def test_wrapped_models_have_the_names_of_plain_ones(wrap):
    model, x = Net(), torch.randn(30, 4)
    noise = attach_activation_noise(wrapped := wrap(model), "pair", 0.3)
    torch.manual_seed(1)
    noisy = wrapped(x)
    assert noise.names == ("pair",)
    noise.remove()
    attach_activation_noise(model, "pair", 0.3)
    torch.manual_seed(1)
    assert torch.equal(noisy, model(x))


def test_names_of_a_wrapper_match_too(process_group):
    wrapped = nn.parallel.DistributedDataParallel(Net())
    assert attach_activation_noise(wrapped, "module.pair", 0.3).names == ("module.pair",)
