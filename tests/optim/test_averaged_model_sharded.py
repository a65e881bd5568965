"""AveragedModel of models that FSDP2 shards: two processes against one.

Run as a program, this file is one of the two processes.
"""

import datetime
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import fastreg
from fastreg.common.batch_norm import update_bn
from fastreg.optim.averaged_model import AveragedModel, get_ema_multi_avg_fn

from .averaged_cases import Net, batch, moving, trained
from .processes import WORLD, run_processes

SHARDED = {
    "equal weights": (torch.float32, {}),
    "ema": (torch.float32, {"multi_avg_fn": get_ema_multi_avg_fn(0.75), "use_buffers": True}),
    "a function": (torch.float32, {"avg_fn": moving}),
    "narrow": (torch.bfloat16, {}),
}


def shard(net: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in (net.first, net):
        fully_shard(layer)
    return net


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def everything(module: nn.Module) -> list[Tensor]:
    return [whole(t) for t in (*module.parameters(), *module.buffers())]


def scaled(net: nn.Module, turns: int) -> Iterator[int]:
    """Instead of training: how a narrow gradient is rounded depends on the order of its sums."""
    for turn in range(turns):
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.25)
        yield turn


def averages_of(name: str, transform: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """Train, average and evaluate; both processes see the whole batch."""
    dtype, options = SHARDED[name]
    net = transform(Net().to(dtype))
    average = AveragedModel(net, **options)
    for turn in trained(net, 3) if dtype == torch.float32 else scaled(net, 3):
        average.update_parameters(net)
        if turn == 1:  # in the middle of training
            average.eval()(batch(8, dtype))
            average.train()
    trained_net = everything(net)
    average.eval()
    shown = average(batch(9, dtype)).detach()
    out = {"output": shown, "state": {key: whole(value) for key, value in average.state_dict().items()}}
    update_bn([batch(1, dtype), batch(2, dtype)], average)
    out["statistics"] = whole(average.state_dict()["module.norm.running_mean"])
    return {
        **out,
        "restored": all(map(torch.equal, everything(net), trained_net)),
        "net": net,
        "average": average,
    }


def sharded_case(name: str) -> dict[str, Any]:
    from torch.distributed.checkpoint import state_dict as checkpoints

    report = averages_of(name, shard)
    net, average = report.pop("net"), report.pop("average")
    before, dtype = everything(net), SHARDED[name][0]
    # Exceptions, also in the middle of the net.
    hook = net.last.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        average(batch(9, dtype))
    except ZeroDivisionError:
        report["restored after an error"] = all(map(torch.equal, everything(net), before))
    hook.remove()
    with average.swapped_in():
        report["swapped in"] = everything(net)
        try:
            average.update_parameters(net)
        except RuntimeError as error:
            report["inside"] = str(error)
    # A forward pass leaves the root gathered, which the next one would take for its weights.
    with torch.no_grad():
        outputs = [model(batch(9, dtype)) for model in (average, net, average, net)]
    report["in turns"] = [torch.equal(outputs[0], outputs[2]), torch.equal(outputs[1], outputs[3])]
    report["differ"] = not torch.equal(outputs[0], outputs[1])
    # Checkpoints.
    options = checkpoints.StateDictOptions(full_state_dict=True)
    other_net = shard(Net().to(dtype))
    other = AveragedModel(other_net, **SHARDED[name][1])
    untouched = everything(other_net)
    checkpoints.set_model_state_dict(other, checkpoints.get_model_state_dict(average), options=None)
    report["loaded"] = all(map(torch.equal, *(
        [whole(value) for value in model.state_dict().values()] for model in (other, average)
    )))  # fmt: skip
    report["loading leaves the model alone"] = all(map(torch.equal, everything(other_net), untouched))
    report["full"] = checkpoints.get_model_state_dict(average, options=options)
    try:
        AveragedModel(Net().to(dtype)).update_parameters(net)
    except ValueError as error:
        report["not sharded"] = str(error)
    try:
        AveragedModel(net, device="cpu")
    except ValueError as error:
        report["device"] = str(error)
    return report


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", timeout=datetime.timedelta(minutes=1), rank=rank, world_size=WORLD
    )
    with fastreg.use_backend("reference"):
        torch.save({name: sharded_case(name) for name in SHARDED}, folder / f"{rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Returns the reports of both processes."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("averaged")
    run_processes("tests.optim.test_averaged_model_sharded", folder)
    return [torch.load(folder / f"{rank}") for rank in range(WORLD)]


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_averages_are_those_of_one_process(name, results, close):
    with fastreg.use_backend("reference"):
        expected = averages_of(name, lambda net: net)
    for report in (result[name] for result in results):
        assert report["state"].keys() == expected["state"].keys()
        for key, value in expected["state"].items():
            close(report["state"][key], value)
            assert value.dtype == report["state"][key].dtype
        if name == "narrow":
            assert report["state"]["averages.first.weight"].dtype == torch.float32
            continue
        close(report["output"], expected["output"])
        close(report["statistics"], expected["statistics"])


@pytest.mark.parametrize("name", SHARDED)
def test_the_sharded_model_is_as_it_was(name, results):
    for report in (result[name] for result in results):
        assert report["restored"] and report["restored after an error"]
        assert report["in turns"] == [True, True] and report["differ"]
        assert "would average them again" in report["inside"]


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_checkpoints(name, results):
    for rank, report in enumerate(result[name] for result in results):
        assert report["loaded"] and report["loading leaves the model alone"]
        if rank == 0:
            plain = AveragedModel(Net().to(SHARDED[name][0]))
            plain.load_state_dict(report["full"])
            assert all(map(torch.equal, plain.module.parameters(), report["swapped in"]))
            if name != "narrow":
                swa_utils.AveragedModel(Net()).load_state_dict(report["full"])


@pytest.mark.parametrize("name", SHARDED)
def test_what_cannot_be_done_with_shards(name, results):
    for report in (result[name] for result in results):
        assert "shard the model first, then make the AveragedModel" in report["not sharded"]
        assert "got device='cpu'; leave it out" in report["device"]


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
