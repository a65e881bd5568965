"""Triton's real launch path with a driver that launches nothing: what recompiles, how many launches."""

import pytest
import torch

import fastreg
from fastreg_benchmarks import chains
from fastreg_benchmarks.stub import stub_driver
from fastreg_kernels import norm, step
from fastreg_kernels.step import step_kernel

EVERYTHING = [fastreg.ClipNorm(1.0), fastreg.GradientNoise(0.1), fastreg.EMA(0.9)]


def parameters(count, dtype=torch.float32, size=24):
    made = [torch.nn.Parameter(torch.zeros(size + i, dtype=dtype)) for i in range(count)]
    for p in made:
        p.grad = torch.zeros_like(p)
    return made


def compiled():
    """How many variants of the step kernel have been compiled."""
    return len(step_kernel.device_caches[0][0])


def test_nothing_recompiles():
    """lr, step, seed, sizes, how many tensors and groups: none of it is in the signature."""
    with stub_driver():
        for count, seed, lr in (
            (3, 0, 1e-3),
            (4, 1, 1.0),
            (17, 2**40 + 3, 0.0),
            (16, -1, 16.0),
            (1, 2**63, 1.0),
        ):
            optimizer = fastreg.AdamW(
                parameters(count, size=count), lr=lr, seed=seed, regularizers=EVERYTHING
            )
            for turn in range(3):
                optimizer.param_groups[0]["lr"] = lr * (turn + 1)
                optimizer.param_groups[0]["weight_decay"] = float(turn)
                optimizer.step()
            optimizer.add_param_group({"params": parameters(2), "lr": 16.0})
            optimizer.step()
        assert compiled() == 1
        assert len(norm.norm_kernel.device_caches[0][0]) == 1
        assert len(norm.clip_factor_kernel.device_caches[0][0]) == 1


@pytest.mark.parametrize(
    ("regularizers", "expected"),
    [((), ["step_kernel"]), (EVERYTHING, ["norm_kernel", "clip_factor_kernel", "step_kernel"])],
)
def test_one_launch_for_all_tensors(regularizers, expected):
    with stub_driver() as launches:
        optimizer = fastreg.AdamW(
            [{"params": parameters(5)}, {"params": parameters(30), "lr": 1.0}], regularizers=regularizers
        )
        optimizer.step()
        assert launches == expected


NORM = ["norm_kernel", "clip_factor_kernel"]


@pytest.mark.parametrize(
    "chain, expected",
    [
        ("SAM+AdamW", [*NORM, "step_kernel", "step_kernel"]),
        ("ASAM+SGD-momentum", [*NORM, "step_kernel", "step_kernel"]),
        ("MSAM+AdamW", [*NORM, "step_kernel"]),
        ("AdamW+Lookahead", ["step_kernel"]),
    ],
)
def test_launches_of_a_step(chain, expected):
    """As many at every step, and nothing compiles after the first round of Lookahead."""
    with stub_driver() as launches:
        step = chains.whole_step(chains.optimizer(chain, parameters(5)))
        for _ in range(chains.K):
            launches.clear()
            step()
            assert launches == expected
        before = compiled()
        for _ in range(chains.K):
            step()
        assert compiled() == before <= 2


def test_one_launch_per_dtype_combination():
    with stub_driver() as launches:
        fastreg.AdamW(parameters(3) + parameters(3, torch.bfloat16) + parameters(2)).step()
        assert launches == ["step_kernel"] * 2


def test_groups_and_step_counts_share_a_launch():
    late, early = parameters(2), parameters(2)
    with stub_driver() as launches:
        optimizer = fastreg.SGD([{"params": early, "lr": 0.1}, {"params": late, "lr": 0.2}], momentum=0.9)
        for p in late:
            p.grad = None
        optimizer.step()
        for p in late:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert launches == ["step_kernel"] * 2
        assert [int(optimizer.state[p]["step"]) for p in early + late] == [2, 2, 1, 1]


def test_static_side_is_uploaded_once(monkeypatch):
    uploads = []
    upload = fastreg.engine.table.upload
    monkeypatch.setattr(fastreg.engine.table, "upload", lambda *a: uploads.append(a) or upload(*a))
    params = parameters(4)
    with stub_driver():
        optimizer = fastreg.AdamW(params)
        for _ in range(3):
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
    assert len(uploads) == 2 + 3  # table and work list, then what changes, every step


def test_kernel_arguments_hold_no_numbers():
    """A Python float or int would specialise: everything that may change lies in tensors."""
    calls = []
    with stub_driver():
        step_kernel.pre_run_hooks.append(lambda *args, **kwargs: calls.append(args))
        try:
            fastreg.AdamW(parameters(2), regularizers=EVERYTHING).step()
        finally:
            step_kernel.pre_run_hooks.pop()
    (arguments,) = calls
    assert all(a is None or isinstance(a, (torch.Tensor, tuple)) for a in arguments)
    assert all(
        isinstance(value, int) for stage in arguments[6] for value in (*stage.state, *stage.step_scalars)
    )
    assert step.HEADER.value == 5
