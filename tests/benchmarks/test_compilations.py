"""Nothing that changes from step to step compiles a kernel anew: batch sizes, lengths, alignments."""

import pytest
import torch

import fastreg
from fastreg_benchmarks import families
from fastreg_benchmarks.families import Inputs
from fastreg_benchmarks.stub import stub_driver, variants

FEATURES = 16
POISSON = torch.poisson(torch.full((50,), 9.0), generator=torch.Generator().manual_seed(0)).int().tolist()
LENGTHS = [1, 2, 3, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 127]
OFFSETS = range(8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "clip+noise+AdamW+EMA", "adaptive+SGD-momentum", "MSAM+AdamW", "dropout", "noise", "weight noise",
        "penalty", "adversarial", "private", "ghost", "AveragedModel", "Lookahead", "SAM",
    ],
)  # fmt: skip
def test_no_kernel_compiles_again(name, dtype):
    """50 Poisson batch sizes, 20 lengths, 8 alignments; each family launches what it launched at first."""
    with stub_driver() as launches:
        families.run(name, Inputs(dtype, "cpu", "triton", [(4, 6, FEATURES)]))
        first, launched = variants(), set(launches)
        for samples, length, offset in zip(POISSON, LENGTHS * 3, [*OFFSETS] * 7, strict=False):
            shape = max(1, samples), length, FEATURES
            families.run(name, Inputs(dtype, "cpu", "triton", [shape], [offset]))
        assert variants() == first
        assert set(launches) == launched == set(first)


def test_large_and_small_inputs_share_a_kernel():
    """Programs get more to do where there are enough of them, without another variant."""
    with stub_driver() as launches:
        for elements in (100, 10**6, 4 * 10**7):
            x = torch.empty(1, dtype=torch.bfloat16).expand(elements).contiguous()
            fastreg.nn.functional.dropout(x, 0.1)
            fastreg.l2_penalty([torch.nn.Parameter(x)], 0.1)
        counts = variants()
        assert counts["dropout_kernel"] == counts["norm_kernel"] == counts["clip_factor_kernel"] == 1
        assert launches.count("dropout_kernel") == 3


def test_rates_for_each_channel_along_any_dimension():
    with stub_driver():
        for length in (1, 2, 8, 9, 16):
            x = torch.zeros(3, 8, length)
            fastreg.nn.functional.dropout(x, [0.1] * 8, dim=1)
        assert variants() == {"dropout_kernel": 1}


def test_private_training():
    """Poisson-sampled batches of different sizes and lengths, by ghost norms and by sums over positions."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(FEATURES, FEATURES), torch.nn.LayerNorm(FEATURES), torch.nn.Linear(FEATURES, 32)
    )
    with stub_driver() as launches:
        optimizer = fastreg.DPOptimizer(
            fastreg.AdamW(model.parameters()), model=model, expected_batch_size=9, noise_multiplier=1.0
        )
        for turn, (samples, length) in enumerate(zip(POISSON[:20], LENGTHS, strict=True)):
            if samples:
                model(torch.randn(samples, length, FEATURES)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if turn == 8:
                first = variants()
        assert variants() == first
        assert {"step_kernel", "sample_sums_kernel"} <= set(launches)
