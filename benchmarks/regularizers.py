"""Benchmarks of regularizers inside the step, against training loops that run each as a separate pass."""

from __future__ import annotations

import torch

from .steps import StepCase, models, rounds
from .suite import Case


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Returns the cases: clipping over several models, and clipping with other components over GPT-2."""
    components = [("clip+AdamW", "gpt2", "fp32"), ("clip+AdamW", "gpt2", "bf16")]
    if not quick:
        components += [
            ("clip+AdamW", "many", "fp32"),
            ("clip+AdamW", "llama", "fp32"),
            ("clip+AdamW", "llama", "bf16"),
        ]
    components += [("clip+AdamW+EMA", "gpt2", "fp32"), ("clip+noise+AdamW+EMA", "gpt2", "fp32")]
    over = models(device, quick)
    return [
        StepCase(
            "regularizers", chain, *over[model], storage, rounds(device, quick),
            compiles=i == 0 and (device.type == "cuda" or not quick),
        )
        for i, (chain, model, storage) in enumerate(components)
    ]  # fmt: skip
