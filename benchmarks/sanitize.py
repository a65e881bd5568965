"""Every kernel once over few, odd and misaligned tensors, for compute-sanitizer.

    compute-sanitizer --tool memcheck python -m fastreg_benchmarks.sanitize [CHAIN ...]

Without a GPU it runs in Triton's interpreter.  The exit status tells whether results were those of the
reference, too.
"""

from __future__ import annotations

import sys

import torch
from torch.nn import Parameter

import fastreg

from . import chains

SIZES = (1, 15, 16, 17, 127, 4096, 4097, 2 * 4096 + 48)
OFFSETS = (0, 1, 3)


def trained(chain: str, dtype: torch.dtype, device: str, backend: str) -> list[torch.Tensor]:
    """The weights after two steps."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for size in SIZES:
        for offset in OFFSETS:  # a view into an allocation: what lies around it belongs to nobody
            weight, gradient = (torch.randn(size + offset, generator=generator) for _ in range(2))
            params.append(Parameter(weight.to(device, dtype)[offset:]))
            params[-1].grad = gradient.to(device, dtype)[offset:]
    optimizer = chains.optimizer(chain, params, lr=0.01, seed=0)
    for group in optimizer.param_groups:
        group["lookahead_k"] = 2  # where there is one, the last step synchronises
    step = chains.whole_step(optimizer)
    with fastreg.use_backend(backend):
        for _ in range(2):
            step()
    return [p.detach().cpu().float() for p in params]


def main(names: list[str]) -> int:
    """Run chains, all of them by default, at all dtypes; 1 if any is wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wrong = 0
    for chain in names or chains.BUDGETS:
        for dtype in (torch.float32, torch.bfloat16):
            found = trained(chain, dtype, device, "triton")
            expected = trained(chain, dtype, "cpu", "reference")
            # The interpreter truncates to bfloat16, and either may round the other way: one unit, twice.
            bound = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
            off = max(
                float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
            )
            wrong += not off <= bound
            print(
                f"{chain}, {dtype}: off by {off:.1e}{'' if off <= bound else ', which is wrong'}", flush=True
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
