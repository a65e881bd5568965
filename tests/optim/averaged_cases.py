"""Models and averages of the tests of `AveragedModel`."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from fastreg.optim.averaged_model import get_ema_multi_avg_fn


class Net(nn.Module):
    """Sizes that do not divide evenly, tied weights, buffers that are whole numbers or not saved."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 7)
        self.tied = nn.Linear(7, 7, bias=False)
        if tied:
            self.tied.weight = self.last.weight
        self.register_buffer("scale", torch.full((7,), 1.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.last(self.norm(self.first(x)).tanh()) * self.scale)


def batch(turn: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the inputs of a turn."""
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(turn)).to(dtype)


def trained(net: nn.Module, turns: int) -> Iterator[int]:
    """Trains a net, and yields after each turn."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for turn in range(turns):
        optimizer.zero_grad()
        net(batch(turn, next(net.parameters()).dtype)).square().mean().backward()
        optimizer.step()
        yield turn


def moving(average: Tensor, weight: Tensor, n_averaged: Any) -> Tensor:
    """Returns an exponential moving average, as a function of one tensor."""
    return average + 0.25 * (weight - average)


FUNCTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "equal weights": dict,
    "ema": lambda: {"multi_avg_fn": get_ema_multi_avg_fn(0.75)},
    "torch's ema": lambda: {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.75)},
    "torch's swa": lambda: {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    "torch's ema, one by one": lambda: {"avg_fn": swa_utils.get_ema_avg_fn(0.75)},
    "a function": lambda: {"avg_fn": moving},
}
about_functions = pytest.mark.parametrize("function", FUNCTIONS)
