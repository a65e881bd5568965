"""Running statistics: estimated anew, and left alone by a second pass."""

import collections
import copy
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

from fastreg.common.batch_norm import frozen_running_stats, update_bn

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
Pair = collections.namedtuple("Pair", "x y")


class Net(nn.Module):
    def __init__(self, momentum: float | None = 0.1, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), norm(4, momentum=momentum, track_running_stats=True))

    @property
    def norm(self) -> nn.Module:
        return self.layers[1]

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.layers(scale * x)


def batches(count: int = 5, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, generator=generator, dtype=dtype) for _ in range(count)]


def statistics(model: nn.Module) -> list[torch.Tensor]:
    return [
        module.get_buffer(name).clone()
        for module in model.modules()
        if hasattr(module, "running_mean")
        for name in STATISTICS
    ]


# Estimated anew.


@pytest.mark.parametrize("momentum", (0.1, None))
def test_statistics_are_means_over_batches(momentum, close):
    net = Net(momentum).double()
    inputs = batches(dtype=torch.float64)
    net(100 + inputs[0])
    update_bn(inputs, net)
    inner = torch.stack([net.layers[0](x) for x in inputs]).detach()
    close(net.norm.running_mean, inner.mean(1).mean(0))
    close(net.norm.running_var, inner.var(1, unbiased=True).mean(0))
    assert int(net.norm.num_batches_tracked) == len(inputs)
    assert net.norm.momentum == momentum


KINDS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, "label"),
    "list": lambda x: [x, None],
    "named tuple": lambda x: Pair(x, 0),
    "mapping": lambda x: {"x": x, "scale": 1.0},
    "mapping of another kind": lambda x: UserDict(x=x),
    "mapping and label": lambda x: ({"x": x}, 3),
}


@pytest.mark.parametrize("device", (None, "cpu", torch.device("cpu")))
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_batches(kind, device):
    ours, theirs = Net(), Net()
    update_bn([KINDS[kind](x) for x in batches()], ours, device)
    swa_utils.update_bn(batches(), theirs)
    assert all(map(torch.equal, statistics(ours), statistics(theirs)))


def test_a_mapping_is_given_whole():
    ours, theirs = Net(), Net()
    update_bn(({"x": x, "scale": 3.0} for x in batches()), ours)
    swa_utils.update_bn([3 * x for x in batches()], theirs)
    assert all(map(torch.equal, statistics(ours), statistics(theirs)))


def test_forward_fn_gets_the_whole_batch_where_it_belongs():
    net, theirs, seen = Net(), Net(), []

    def forward(model, batch):
        assert model is net
        seen.append(batch)
        return model(batch["inputs"][0].to(torch.float32), batch["scale"])

    inputs = [{"inputs": [x], "scale": 2.0, "pair": Pair(x, "y")} for x in batches()]
    update_bn(inputs, net, "cpu", forward)
    swa_utils.update_bn([2 * x for x in batches()], theirs)
    assert all(map(torch.equal, statistics(net), statistics(theirs)))
    assert len(seen) == 5 and isinstance(seen[0]["pair"], Pair)


def test_tensors_are_moved():
    """To a device without memory, wherever in the batch they are."""
    net, seen = Net(), []

    def forward(model, batch):
        seen.append(batch)

    x = batches()[0]
    update_bn([{"list": [x, (x, 1)], "pair": Pair(x, "y"), "x": x}], net, "meta", forward)
    (moved,) = seen
    tensors = [moved["list"][0], moved["list"][1][0], moved["pair"].x, moved["x"]]
    assert {t.device.type for t in tensors} == {"meta"}
    assert moved["list"][1][1] == 1 and moved["pair"].y == "y"


def test_every_module_keeps_its_mode():
    """torch's sets all of them to that of the outermost."""
    net = nn.Sequential(Net(), nn.Dropout(), nn.BatchNorm1d(4))
    net.train()
    net[1].eval()
    modes = [module.training for module in net.modules()]
    update_bn(batches(), net)
    assert [module.training for module in net.modules()] == modes
    with pytest.raises(ZeroDivisionError):
        update_bn((1 / 0 if i else x for i, x in enumerate(batches())), net)
    assert [module.training for module in net.modules()] == modes
    assert net[2].momentum == 0.1


def test_nothing_to_estimate_reads_nothing():
    update_bn((1 / 0 for _ in range(1)), nn.Linear(3, 4))


def test_an_empty_loader_is_an_error():
    net = Net()
    net(batches()[0])
    before = statistics(net)
    with pytest.raises(ValueError, match=r"loader must yield a batch, got none from \[\]"):
        update_bn([], net)
    used = iter(batches())
    update_bn(used, Net())
    with pytest.raises(ValueError, match="is it an iterator that is used up"):
        update_bn(used, net)
    assert all(map(torch.equal, statistics(net), before))


@pytest.mark.parametrize("batch", (3, "text", (), [[1.0]]))
def test_other_batches_are_refused(batch):
    with pytest.raises(TypeError, match="batches must be tensors, mappings.*pass forward_fn="):
        update_bn([batch], Net())


def test_forward_fn_must_be_callable():
    with pytest.raises(TypeError, match="forward_fn must be callable as .*, got 3"):
        update_bn(batches(), Net(), forward_fn=3)


# Left alone.


@pytest.mark.parametrize("momentum", (0.1, None))
def test_a_second_pass_leaves_them_alone(momentum):
    once, twice = Net(momentum), Net(momentum)
    for x in batches():
        once(x)
        twice(x)
        before = statistics(twice)
        assert all(map(torch.equal, before, statistics(once)))
        weights = copy.deepcopy(twice.layers[0])
        with torch.no_grad():
            twice.layers[0].weight.add_(1)
        with frozen_running_stats(twice):
            second = twice(x)
        twice.layers[0] = weights
        assert all(map(torch.equal, statistics(twice), before))
    assert int(twice.norm.num_batches_tracked) == 5
    assert not torch.equal(second, once(batches()[-1]))


@pytest.mark.parametrize("norm", (nn.BatchNorm1d, nn.InstanceNorm1d, nn.SyncBatchNorm))
@pytest.mark.parametrize("momentum", (0.1, None))
def test_outputs_and_gradients_are_those_of_training_mode(norm, momentum):
    if norm is nn.SyncBatchNorm and not torch.cuda.is_available():
        pytest.skip("SyncBatchNorm needs a GPU")
    net = nn.Sequential(nn.Conv1d(3, 4, 1), norm(4, momentum=momentum, affine=True, track_running_stats=True))
    x = torch.randn(6, 3, 5)
    if norm is nn.InstanceNorm1d and momentum is None:
        net[1].momentum = 0.0  # torch's InstanceNorm does not know `None`
    net(x)
    twin = copy.deepcopy(net)
    before = statistics(net)
    expected = twin(x)
    with frozen_running_stats(net):
        actual = net(x)
    expected.square().sum().backward()
    actual.square().sum().backward()  # after the block
    assert torch.equal(actual, expected)
    gradients = [p.grad for p in net.parameters()]
    assert all(map(torch.equal, gradients, [p.grad for p in twin.parameters()]))
    assert all(map(torch.equal, statistics(net), before))


def test_they_are_the_same_tensors_afterwards():
    net = Net()
    before = [net.norm.get_buffer(name) for name in STATISTICS]
    state = net.state_dict().keys()
    with frozen_running_stats(net):
        net(batches()[0])
    assert all(net.norm.get_buffer(name) is tensor for name, tensor in zip(STATISTICS, before, strict=True))
    assert net.state_dict().keys() == state


def test_a_forward_pass_before_the_block_may_go_backward_after_it():
    net = Net()
    x = batches()[0].requires_grad_()
    first = net(x).square().sum()
    with frozen_running_stats(net):
        second = net(x).square().sum()
    (first + second).backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_nested_blocks():
    net = Net()
    net(batches()[0])
    before = statistics(net)
    with frozen_running_stats(net):
        with frozen_running_stats(net), frozen_running_stats(net.layers):
            net(batches()[1])
        net(batches()[2])
    assert all(map(torch.equal, statistics(net), before))
    net(batches()[1])
    assert int(net.norm.num_batches_tracked) == 2


def test_what_is_not_finite_does_not_enter():
    net = Net()
    net(batches()[0])
    before = statistics(net)
    with frozen_running_stats(net):
        assert net(batches()[1] * float("nan")).isnan().all()
    assert all(map(torch.equal, statistics(net), before))


def test_exceptions_restore():
    net = Net()
    before = [net.norm.get_buffer(name) for name in STATISTICS]
    with pytest.raises(ZeroDivisionError), frozen_running_stats(net):
        1 / 0  # noqa: B018
    assert all(net.norm.get_buffer(name) is tensor for name, tensor in zip(STATISTICS, before, strict=True))


def test_eval_mode_is_untouched():
    """Such a layer needs its statistics."""
    net = nn.Sequential(Net(), nn.BatchNorm1d(4))
    net(batches()[0])
    net[1].eval()
    x = batches()[1]
    expected = copy.deepcopy(net)(x)
    with frozen_running_stats(net):
        assert torch.equal(net(x), expected)
        assert net[1].running_mean is not None and net[0].norm.running_mean is None


def test_layers_without_statistics():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with frozen_running_stats(net):
        net(batches()[0])
    assert net[1].running_mean is None
