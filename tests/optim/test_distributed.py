"""Two processes against one: DTensors, FSDP2, DDP and their checkpoints."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastreg.runtime.backend import has_compiler, has_triton

from .distributed_cases import (
    CASES,
    FLAT,
    Net,
    adamw,
    by_units,
    noise,
    outcome,
    perturbed_net,
    quiet,
    train_flat,
    train_net,
    train_tensors,
    unclipped,
)
from .processes import WORLD, run_processes


def missing(name: str) -> str | None:
    if "triton" in name and not has_triton():
        return "triton is not installed"
    if "compiled" in name and not has_compiler():
        return "backend 'compiled' needs a C++ compiler"
    return None


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The results of both processes, for every case."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("distributed")
    names = [name for name in CASES if not missing(name)]
    run_processes("tests.optim.distributed_cases", folder, *names, timeout=300, TRITON_INTERPRET="1")
    return {
        name: [torch.load(folder / f"{i}.{rank}") for rank in range(WORLD)] for i, name in enumerate(names)
    }


@pytest.fixture
def outcomes(request: pytest.FixtureRequest, results: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of both processes, for the case that the test is about."""
    name = request.param
    if reason := missing(name):
        pytest.skip(reason)
    for rank, result in enumerate(results[name]):
        assert "error" not in result, f"rank {rank}\n{result['error']}"
    return results[name]


def about(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("outcomes", names, indirect=True)


Close = Callable[[Any, Any], None]


@about(*(name for name in CASES if name.startswith(("adamw", "quiet"))))
def test_shards_are_trained_as_the_whole(
    outcomes: list[dict[str, Any]], close: Close, request: pytest.FixtureRequest
) -> None:
    expected = train_tensors(quiet if "quiet" in request.node.callspec.id else adamw, "reference")
    for result in outcomes:
        assert result.keys() == expected.keys()
        for name in ("weights", "exp_avg", "exp_avg_sq", "ema"):
            close(result[name], expected[name])
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-6)
    assert outcomes[0]["norms"] == outcomes[1]["norms"]
    assert min(expected["norms"]) > 0.5  # or nothing was clipped


@about("noise reference", "noise triton", "unclipped reference")
def test_without_clipping_shards_are_trained_to_the_same_bits(
    outcomes: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    make = noise if "noise" in request.node.callspec.id else unclipped
    expected = train_tensors(make, "reference")
    for result in outcomes:
        for name in expected.keys() - {"norms"}:
            assert all(map(torch.equal, result[name], expected[name])), name


@about("units reference", "units triton")
def test_units_and_largest_norms_of_shards(outcomes: list[dict[str, Any]], close: Close) -> None:
    expected = train_tensors(by_units, "reference")
    for result in outcomes:
        for name in ("weights", "momentum_buffer"):
            close(result[name], expected[name])
        assert result["norms"] == expected["norms"]


@about("weight noise")
def test_shards_of_weights_get_the_noise_of_the_whole(outcomes: list[dict[str, Any]], close: Close) -> None:
    expected = perturbed_net(Net())
    for result in outcomes:
        assert all(map(torch.equal, result["noisy"], expected["noisy"]))
        assert all(map(torch.equal, result["back"], [p.detach() for p in Net().parameters()]))
        close(result["output"], expected["output"])


@about("columns")
def test_other_placements_are_refused(outcomes: list[dict[str, Any]]) -> None:
    for result in outcomes:
        assert "must be placed with Shard(0) or Replicate()" in result["message"]
        assert "Shard(dim=1)" in result["message"]
        assert torch.equal(result["weight"], torch.ones(4, 6))


def one_process(steps: int) -> dict[str, Any]:
    net = Net()
    optimizer = adamw(net.parameters())
    norms = train_net(net, optimizer, range(steps))
    return {**outcome(optimizer), "norms": norms}


@about("fsdp", "ddp")
def test_models_are_trained_as_by_one_process(outcomes: list[dict[str, Any]], close: Close) -> None:
    expected = one_process(3)
    for result in outcomes:
        for name in ("weights", "exp_avg", "exp_avg_sq", "ema"):
            close(result[name], expected[name])
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-6)


@about(*(f"flat {name}" for name in FLAT))
def test_flat_minima_and_averages_of_sharded_models(
    outcomes: list[dict[str, Any]], close: Close, request: pytest.FixtureRequest
) -> None:
    name = next(name for name in FLAT if request.node.callspec.id == f"flat {name}")
    net = Net().double()  # in float32, gradients differ by the order of their sums
    start = [p.detach().clone() for p in net.parameters()]
    expected = train_flat(net, name)
    assert not any(map(torch.equal, start, expected["weights"]))
    for result in outcomes:
        assert result.keys() == expected.keys()
        for key, tensors in expected.items():
            close(result[key], tensors)


@about("one perturbation", "two perturbations")
def test_m_sharpness(outcomes: list[dict[str, Any]], request: pytest.FixtureRequest, close: Close) -> None:
    shared = "one" in request.node.callspec.id
    expected = torch.tensor((2.141421356, 2.070710678) if shared else (2.2, 2.1), dtype=torch.float64)
    for result in outcomes:
        assert (result["gradient"] - expected).abs().max() < 1e-9
        close(result["weight"], torch.tensor([1.0, 2.0], dtype=torch.float64) - result["gradient"])
    assert torch.equal(outcomes[0]["perturbed"], outcomes[1]["perturbed"]) is shared


@about("fsdp")
def test_fsdp_keeps_its_shards(outcomes: list[dict[str, Any]]) -> None:
    for result in outcomes:
        assert result["all sharded"]
        assert result["all in place"]
        assert all(map(torch.equal, result["averaged"], result["ema"]))


@about("ddp")
def test_replicas_stay_the_same_bits(outcomes: list[dict[str, Any]]) -> None:
    first, second = outcomes
    assert first["norms"] == second["norms"]
    for name in ("weights", "exp_avg", "exp_avg_sq", "ema"):
        assert all(map(torch.equal, first[name], second[name])), name


@about("checkpoint", "full checkpoint")
def test_a_sharded_checkpoint_goes_on_with_the_same_bits(outcomes: list[dict[str, Any]]) -> None:
    for result in outcomes:
        assert result["seed"] == 7
        for name, straight in result["straight"].items():
            assert all(map(torch.equal, result["resumed"][name], straight)), name
