"""Batches and outputs of any nesting keep their kinds when their tensors change."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fastreg.common.batches import map_first_tensor, map_items, move_to_device


class Pair(NamedTuple):
    first: object
    second: object


def test_items_of_nested_batches():
    x = torch.ones(2)
    batch = {"a": [x, (3, "text")], "b": Pair(x, None)}
    doubled = map_items(batch, lambda item: 2 * item if isinstance(item, Tensor) else item)
    assert torch.equal(doubled["a"][0], 2 * x) and torch.equal(doubled["b"].first, 2 * x)
    assert doubled["a"][1] == (3, "text") and isinstance(doubled["b"], Pair) and doubled["b"].second is None


def test_moving_to_a_device():
    x = torch.ones(2)
    moved = move_to_device({"a": [x, 3], "b": Pair(x, "text")}, "meta")
    assert moved["a"][0].is_meta and moved["b"].first.is_meta
    assert moved["a"][1] == 3 and moved["b"].second == "text"
    assert move_to_device(batch := [x], None) is batch


@pytest.mark.parametrize("make", [lambda x: x, lambda x: (x, x), lambda x: [x, 3], lambda x: Pair(x, "text")])
def test_the_first_tensor_of_an_output(make):
    output = make(torch.ones(2))
    changed = map_first_tensor(nn.ReLU(), output, lambda x: x + 1)
    assert type(changed) is type(output)
    first, expected = (t if isinstance(t, Tensor) else t[0] for t in (changed, output))
    assert torch.equal(first, expected + 1)
    if not isinstance(output, Tensor):
        assert changed[1] is output[1]


@pytest.mark.parametrize("output", [{"x": torch.ones(2)}, (), (3, torch.ones(2)), None])
def test_outputs_without_a_first_tensor(output):
    message = f"the output of ReLU must be a tensor, .* got {type(output).__name__}; choose a module within"
    with pytest.raises(TypeError, match=message):
        map_first_tensor(nn.ReLU(), output, torch.neg)
