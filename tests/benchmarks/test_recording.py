"""What reaches the driver, by Triton's own C launcher over a library that records its launches."""

import pytest
import torch

import fastreg
from fastreg.ops import dropout as dropout_ops
from fastreg.ops import ghost as ghost_ops
from fastreg_benchmarks import families, stub
from fastreg_benchmarks.entry_points import entry_points
from fastreg_benchmarks.families import Inputs
from fastreg_benchmarks.recording import recording_driver

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the real libcuda is loaded")
THREADS = {"clip_factor_kernel": 512, "ghost_sums_kernel": 256}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "AdamW", "clip+noise+AdamW+EMA", "adaptive+SGD-momentum", "MSAM+AdamW", "SAM+AdamW", "dropout",
        "noise", "weight noise", "penalty", "adversarial", "private", "ghost", "AveragedModel", "Lookahead",
    ],
)  # fmt: skip
def test_parameters_arrive_as_they_were_given(name, dtype):
    """Addresses and integers, in the order of the kernel; tuples of stages are compiled in."""
    with recording_driver() as launches:
        families.run(name, Inputs(dtype, "cpu", "triton", [(3, 5, 16), (1, 1, 4097)], [0, 1]))
    assert launches
    for launch in launches:
        assert launch.parameters == launch.arguments and launch.parameters, launch.kernel
        assert launch.grid[1:] == (1, 1) and launch.threads == THREADS.get(launch.kernel, 128)


def test_all_kernels_are_among_them():
    names = (
        "clip+noise+AdamW+EMA",
        "adaptive+SGD-momentum",
        "dropout",
        "noise",
        "adversarial",
        "private",
        "ghost",
    )
    with recording_driver() as launches:
        for name in names:
            families.run(name, Inputs(torch.float32, "cpu", "triton", [(3, 5, 16)]))
    assert {launch.kernel for launch in launches} == entry_points().keys()


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_kernels_are_those_of_the_target(target):
    with recording_driver(target) as launches:
        families.run("SGD", Inputs(torch.float32, "cpu", "triton", [(3, 5, 16)]))
        assert {made.metadata.target for made in stub.compiled()} == {stub.gpu_target(target)}
    assert launches


@pytest.mark.parametrize("target", ["gfx942", "sm_75"])
def test_other_targets_are_refused(target):
    with pytest.raises(ValueError, match=f"NVIDIA GPUs alone, from sm_80 on: .* got '{target}'"):
        recording_driver(target).__enter__()


def grids(launches):
    return [(launch.kernel.removesuffix("_kernel"), launch.grid[0]) for launch in launches]


def test_a_program_for_each_block_of_a_step():
    params = [torch.nn.Parameter(torch.zeros(size)) for size in (1, 4096, 4097, 0)]
    for p in params:
        p.grad = torch.zeros_like(p)
    with recording_driver() as launches:
        fastreg.AdamW(params, regularizers=[fastreg.ClipNorm(1.0)]).step()
    assert grids(launches) == [("norm", 4), ("clip_factor", 1), ("step", 4)]
    assert launches[1].parameters["count"] == 4 and launches[0].parameters["turns"] == 4


def test_large_norms_take_larger_blocks():
    zeros = torch.zeros(1).expand(40_000_000).contiguous()
    with recording_driver() as launches:
        fastreg.l2_penalty([torch.nn.Parameter(zeros)], 0.1)
    assert grids(launches)[0] == ("norm", -(-40_000_000 // 16384)) and launches[0].parameters["turns"] == 16


@pytest.mark.parametrize("elements, programs", [(100, 1), (8 * 1024 * 768, 3072), (40_000_000, 2442)])
def test_dropout_has_work_for_every_multiprocessor(elements, programs):
    x = torch.zeros(1, dtype=torch.bfloat16).expand(elements).contiguous()
    with recording_driver() as launches:
        dropout_ops.dropout(x, torch.tensor(1), torch.tensor(6554, dtype=torch.int32), 1, None)
    assert grids(launches) == [("dropout", programs)]
    assert launches[0].parameters["n"] == elements
    assert launches[0].parameters["x"] == x.data_ptr()


def test_more_samples_than_the_second_dimension_of_a_grid_holds():
    samples = 65_537
    with recording_driver() as launches:
        ghost_ops.sample_sums(torch.ones(samples, 1, 4))
        ghost_ops.ghost_sums(torch.ones(samples, 1, 2), torch.ones(samples, 1, 3))
    assert grids(launches) == [("sample_sums", samples), ("ghost_sums", samples)]


def test_ghost_norms_of_too_many_tiles_take_several_launches(monkeypatch):
    """A launch has fewer than 2³¹ programs: samples times tiles squared."""
    monkeypatch.setattr(ghost_ops, "MOST_PROGRAMS", 3 * 2**2)
    with recording_driver() as launches:
        sums = ghost_ops.ghost_sums(torch.ones(7, 65, 2), torch.ones(7, 65, 3))
    assert grids(launches) == [("ghost_sums", 12), ("ghost_sums", 12), ("ghost_sums", 4)]
    assert sums.shape == (5, 7)
