"""Keys, seeds and streams: where the random numbers of an optimizer come from, on every backend."""

import copy
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastreg
from fastreg.common import random
from fastreg.common.random import Purpose, key
from fastreg.engine import layout
from fastreg.reference.random import PhiloxPosition, normal
from fastreg.runtime import backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# (seed, purpose, instance) and its key.  Whoever has to change one breaks the promise of the same seed.
GOLDEN = {
    (0, Purpose.INSTANCE, 0): "e169c58d6627e8d5",
    (0, Purpose.GRADIENT_NOISE, 0): "5cb200dbf8e4cca4",
    (0, Purpose.STOCHASTIC_ROUNDING, 0): "51c732a604faa329",
    (0, Purpose.PRIVACY, 0): "6a4474a6c990ef29",
    (0, Purpose.DROPOUT, 0): "b193f16eef3dc354",
    (-1, Purpose.GRADIENT_NOISE, 0): "4b67e03419fed511",
    (2**40 + 3, Purpose.GRADIENT_NOISE, 0): "a8df4fde23d24d0e",
    (2**40 + 3, Purpose.DROPOUT, 2**32 + 7): "1cc5b48cdc0f8a22",
    (2**64 - 1, Purpose.INSTANCE, 1): "f0ea2a5e85af3999",
}


@pytest.fixture(params=("reference", "compiled", "triton"))
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn, and the device that it runs on here."""
    if request.param == "compiled" and not backend.has_compiler():
        pytest.skip("backend 'compiled' needs a C++ compiler")
    if request.param == "triton" and not (
        backend.has_triton() and (INTERPRETED or torch.cuda.is_available())
    ):
        pytest.skip("backend 'triton' needs triton, and TRITON_INTERPRET=1 or a GPU")
    with fastreg.use_backend(request.param):
        yield "cuda" if request.param == "triton" and not INTERPRETED else "cpu"


def noise(
    device: str, counts: Sequence[int], seed: int, step: int = 1, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """What `GradientNoise(1.0)` adds to the gradients of tensors of these sizes at a step."""
    parameters = [torch.nn.Parameter(torch.zeros(count, dtype=dtype, device=device)) for count in counts]
    optimizer = fastreg.SGD(
        parameters, lr=1.0, regularizers=[fastreg.GradientNoise(1.0)], bf16="nearest", seed=seed
    )
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(step):
        for parameter in parameters:
            parameter.detach().zero_()
        optimizer.step()
    return [-parameter.detach().cpu() for parameter in parameters]


def expected(seed: int, count: int, stream: int = 0, step: int = 1, first: int = 0) -> Tensor:
    at = PhiloxPosition(first - first % 8, first % 8, stream, step)
    return normal(key(seed, Purpose.GRADIENT_NOISE), at, torch.empty(count))


def assert_same(drawn: Tensor, value: Tensor) -> None:
    """The same bits; on a GPU multiply-adds are fused, and each side is within 5 ulp of float64."""
    if INTERPRETED or not torch.cuda.is_available():
        assert torch.equal(drawn, value.to(drawn.dtype))
    else:
        torch.testing.assert_close(drawn, value.to(drawn.dtype), rtol=10 * 2**-23, atol=0)


@pytest.mark.parametrize("seed", (0, -1, 2**40 + 3, 2**64 - 5))
def test_noise_is_that_of_seed_stream_step_and_index(device: str, seed: int) -> None:
    counts = 4103, 129, 0, 129, 1
    for step in (1, 3):
        for stream, drawn in enumerate(noise(device, counts, seed, step)):
            assert_same(drawn, expected(seed, counts[stream], stream, step))


@pytest.mark.slow(device="compiled")
@pytest.mark.parametrize("first", (1, 7, 2499, 4096, 2**32 - 3, 2**33 + 5, 2**34 - 64, 2**35 - 9))
def test_a_shard_gets_the_noise_of_the_whole(
    device: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "first_element", lambda parameter: first)
    for count in (3, 200):
        assert_same(*noise(device, [count], 7), expected(7, count, first=first))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16))
def test_noise_does_not_depend_on_how_weights_are_stored(dtype: torch.dtype) -> None:
    for name in ("reference", "triton") if INTERPRETED and backend.has_triton() else ("reference",):
        with fastreg.use_backend(name):
            assert torch.equal(*noise("cpu", [1003], 7, dtype=dtype), expected(7, 1003).to(dtype)), name


def test_a_parameter_without_gradient_leaves_the_noise_of_others_alone() -> None:
    first, second = (torch.nn.Parameter(torch.zeros(50)) for _ in range(2))
    optimizer = fastreg.SGD([first, second], lr=1.0, regularizers=[fastreg.GradientNoise(1.0)], seed=7)
    second.grad = torch.zeros(50)
    optimizer.step()
    assert torch.equal(-second.detach(), expected(7, 50, stream=1))
    assert not first.any()


def test_keys_never_change() -> None:
    assert {arguments: f"{key(*arguments) % 2**64:016x}" for arguments in GOLDEN} == GOLDEN


def test_keys_do_not_depend_on_the_default_device() -> None:
    with torch.device("meta"):
        assert key.__wrapped__(7, Purpose.PRIVACY) == key(7, Purpose.PRIVACY)


def test_keys_differ_for_every_seed_purpose_and_instance() -> None:
    seeds = [value << shift for shift in (0, 31, 32, 62) for value in (1, -1)] + [0, 2, -(2**63)]
    instances = (0, 1, 2, 2**32, 2**33)
    keys = [key(*arguments) for arguments in itertools.product(seeds, Purpose, instances)]
    assert len(set(keys)) == len(seeds) * len(Purpose) * len(instances)
    assert all(-(2**63) <= k < 2**63 for k in keys)
    assert key(-1, Purpose.DROPOUT) == key(2**64 - 1, Purpose.DROPOUT)


@pytest.mark.parametrize(
    ("seed", "message"),
    [(2**64, "fit in 64 bits"), (-(2**63) - 1, f"be a whole number >= {-(2**63)}")],
)
def test_a_seed_of_more_than_64_bits_is_refused(seed: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^seed must fit in 64 bits, got seed={seed}$"):
        key(seed, Purpose.PRIVACY)
    with pytest.raises(ValueError, match=f"^seed must {message}, got seed={seed}$"):
        fastreg.AdamW([torch.nn.Parameter(torch.zeros(1))], seed=seed)


def test_seeds_come_from_torch_and_differ_between_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    def seeds(initial: int) -> list[int]:
        monkeypatch.setattr(random, "_instances", itertools.count())
        torch.manual_seed(initial)
        return [fastreg.SGD([torch.nn.Parameter(torch.zeros(1))]).seed for _ in range(3)]

    state = torch.get_rng_state()
    try:
        assert seeds(1) == seeds(1)
        assert len({*seeds(1), *seeds(2), *seeds(-1)}) == 9
    finally:
        torch.set_rng_state(state)


def test_torch_generator_is_not_consumed(device: str) -> None:
    before = torch.get_rng_state()
    noise(device, [100], 7)
    fastreg.SGD([torch.nn.Parameter(torch.zeros(1))], regularizers=[fastreg.GradientNoise(1.0)])
    assert torch.equal(torch.get_rng_state(), before)


def optimizer_for(parameters: list[torch.nn.Parameter], seed: int | None) -> fastreg.AdamW:
    components = [fastreg.ClipNorm(1.0), fastreg.GradientNoise(0.1), fastreg.EMA(0.9)]
    return fastreg.AdamW(parameters, lr=0.1, regularizers=components, seed=seed)


def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.sin(torch.arange(parameter.numel()) * (i + 1.0) + step)
        optimizer.step()


def weights() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(count)) for count in (40, 7)]


def test_the_seed_is_stored_where_random_numbers_are_drawn() -> None:
    quiet = fastreg.AdamW(weights(), regularizers=[fastreg.ClipNorm(1.0), fastreg.EMA(0.9)], seed=5)
    noisy = optimizer_for(weights(), seed=5)
    noisy.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    assert ["seed" in group for group in quiet.param_groups] == [False]
    assert [group["seed"] for group in noisy.param_groups] == [5, 5]
    assert quiet.seed == noisy.seed == 5


def saved(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_loaded_optimizer_goes_on_with_the_same_noise() -> None:
    straight = weights()
    train(optimizer_for(straight, seed=2**63 + 5), range(6))

    parameters = weights()
    optimizer = optimizer_for(parameters, seed=2**63 + 5)
    train(optimizer, range(3))
    copied = copy.deepcopy(optimizer)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    loaded = optimizer_for(resumed, seed=1)
    loaded.load_state_dict(saved(optimizer.state_dict()))
    assert loaded.seed == copied.seed == 2**63 + 5
    for each in (loaded, copied, optimizer):
        train(each, range(3, 6))
        ends = [p for group in each.param_groups for p in group["params"]]
        assert all(map(torch.equal, ends, straight))


def test_a_state_without_a_seed_leaves_the_seed_alone() -> None:
    parameters = weights()
    plain = torch.optim.AdamW(parameters, lr=0.1)
    train(plain, range(2))
    noisy = optimizer_for(weights(), seed=5)
    noisy.load_state_dict(plain.state_dict())
    assert [group["seed"] for group in noisy.param_groups] == [5]


def test_another_seed_gives_other_weights() -> None:
    one, other = weights(), weights()
    train(optimizer_for(one, seed=1), range(1))
    train(optimizer_for(other, seed=2), range(1))
    assert not any(map(torch.equal, one, other))
