"""Runs every family of kernels on odd and misaligned tensors, for compute-sanitizer.

    compute-sanitizer --tool memcheck python -m fastreg_benchmarks.sanitize [NAME ...]

Names are those of `families.FAMILIES`, all by default.  Without a GPU, TRITON_INTERPRET=1 runs it in Triton's
interpreter.  Results are compared with the reference, too: the exit status is 1 if any is wrong.
"""

from __future__ import annotations

import sys

import torch

from . import families

SHAPES = [
    *((1, size, 1) for size in (1, 15, 16, 17, 127, 4096, 4097, 2 * 4096 + 48)),
    (3, 5, 17), (2, 70, 16),
]  # fmt: skip
"""Elements around those of a thread and of a program; few features, since some kernels compile for each."""
OFFSETS = (0, 1, 3)
CHOSEN = (
    "clip+noise+AdamW+EMA",
    "private",
    "ghost",
    "dropout",
    "noise",
    "adversarial",
    "penalty",
    "SGD-momentum",
)
"""Families that `gpu` runs under compute-sanitizer, in this order."""
DRY = ("penalty",)


def main(names: list[str]) -> int:
    """Runs families in float32 and bfloat16; returns 1 if any result is wrong, else 0."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wrong = 0
    for name in names or families.FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            actual, expected = (
                families.run(name, families.Inputs(dtype, where, backend, SHAPES, OFFSETS))
                for where, backend in ((device, "triton"), (device, "reference"))
            )
            off, bound = families.error(actual, expected), families.bound(dtype, SHAPES, name)
            wrong += not off <= bound
            print(
                f"{name}, {dtype}: off by {off:.1e}{'' if off <= bound else ', which is wrong'}", flush=True
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
