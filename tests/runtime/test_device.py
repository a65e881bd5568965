"""What launching needs of a device: limits of a launch, alignment, what architecture a device has."""

import re

import pytest
import torch

from fastreg.runtime import device
from fastreg.runtime.launch_parameters import (
    DEFAULTS,
    MEASURED,
    PROGRAMS,
    Architecture,
    LaunchParameters,
    launch_parameters,
    trying,
)

CPU = torch.device("cpu")


class Kernel:
    """Something that can be launched, and notes how."""

    __name__ = "toy_kernel"

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.calls.append((grid, arguments, constants))


def test_launches_in_the_first_dimension():
    kernel = Kernel()
    device.launch(kernel, 70_000, CPU, 1, 2, BLOCK=3)
    assert kernel.calls == [((70_000,), (1, 2), {"BLOCK": 3})]


def test_no_programs_are_no_launch():
    kernel = Kernel()
    device.launch(kernel, 0, CPU)
    assert kernel.calls == []


def test_more_programs_than_a_launch_can_have_are_refused():
    """Triton 3.6 multiplies in 32 bits and would launch nothing."""
    kernel = Kernel()
    device.launch(kernel, 2**31 - 1, CPU)
    with pytest.raises(ValueError, match=r"toy_kernel would take 2147483648 programs.*split the batch"):
        device.launch(kernel, 2**31, CPU)
    assert len(kernel.calls) == 1


def test_aligned():
    whole = torch.arange(33, dtype=torch.float32)
    assert device.aligned(whole) is whole and device.aligned(whole[4:]).data_ptr() == whole[4:].data_ptr()
    moved = device.aligned(whole[1:])
    assert moved.data_ptr() % 16 == 0 and torch.equal(moved, whole[1:])


def test_a_cpu_stands_for_what_is_compiled_for():
    assert device.architecture(CPU) == device.H200
    amd = Architecture("gfx942", 64, 304)
    with device.assumed(amd):
        assert device.architecture(CPU) == amd
    assert device.architecture(CPU) == device.H200


def test_small_inputs_are_split_among_all_multiprocessors():
    chosen, target = DEFAULTS["dropout"], device.H200
    full = PROGRAMS * target.multiprocessors * chosen.block
    blocks = {2 * full: 16384, full: 16384, full - 1: 8192, 8 * 1024 * 768: 2048, 1: 2048}
    assert {elements: chosen.block_for(elements, target) for elements in blocks} == blocks
    assert DEFAULTS["step"].block_for(1, target) == DEFAULTS["step"].block
    for lanes in (32, 64):  # a program works on whole chunks, and on one at least
        target = Architecture("any", lanes, 132)
        for chosen in (p for p in DEFAULTS.values() if p.least):
            blocks = [chosen.block_for(10**i, target) for i in range(10)]
            assert all(block and block % chosen.chunk(lanes) == 0 for block in blocks)


def test_what_an_architecture_was_measured_to_want(monkeypatch):
    faster = LaunchParameters(8192, warps=8)
    monkeypatch.setitem(MEASURED, "sm_90", {"step": faster})
    assert launch_parameters("step", device.H200) == faster
    assert launch_parameters("step", Architecture("sm_80", 32, 108)) == DEFAULTS["step"]
    assert launch_parameters("norm", device.H200) == DEFAULTS["norm"]


def test_what_is_in_the_table_can_be_launched():
    """By architectures and kernels that exist, on warps of 32 and of 64."""
    for name, kernels in MEASURED.items():
        assert re.fullmatch(r"sm_\d+|gfx[0-9a-f]{3,4}", name) and kernels.keys() <= DEFAULTS.keys()
        for kernel in kernels:
            launch_parameters(kernel, Architecture(name, 64 if name.startswith("gfx9") else 32, 100))
    for kernel in DEFAULTS:
        for target in (device.H200, Architecture("gfx942", 64, 304)):
            assert launch_parameters(kernel, target) == DEFAULTS[kernel]


@pytest.mark.parametrize(
    "kernel, wrong, expected",
    [
        ("norm", LaunchParameters(4096, warps=16, per_thread=16), "block must be at least .* = 8192"),
        ("step", LaunchParameters(1536), "block must be a power of two, got 1536"),
        ("dropout", LaunchParameters(16384, least=3000), "least must be a power of two, got 3000"),
        ("noise", LaunchParameters(16384, per_thread=0), "per_thread must be a power of two, got 0"),
        ("ghost_sums", LaunchParameters(64, depth=24), "depth must be a power of two, got 24"),
    ],
)
def test_parameters_that_would_leave_elements_out_are_refused(kernel, wrong, expected, monkeypatch):
    monkeypatch.setitem(MEASURED, "sm_90", {kernel: wrong})
    with pytest.raises(ValueError, match=expected):
        launch_parameters(kernel, device.H200)
    with trying(kernel, wrong), pytest.raises(ValueError, match=expected):
        launch_parameters(kernel, device.H200)


def test_trying_parameters():
    other = LaunchParameters(2048, warps=2, stages=3)
    with trying("norm", other):
        assert launch_parameters("norm", device.H200) == other
        with trying("step", other):
            assert launch_parameters("norm", device.H200) == launch_parameters("step", device.H200) == other
    assert launch_parameters("norm", device.H200) == DEFAULTS["norm"]
    assert other.options == {"num_warps": 2, "num_stages": 3, "enable_fp_fusion": True}
    with pytest.raises(KeyError), trying("nrom", other):
        pass
