"""Benchmarks of update rules alone, which fastreg runs in one launch, or in one compiled pass on a CPU."""

from __future__ import annotations

import torch

from .steps import StepCase, models, rounds
from .suite import Case


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Returns the cases: AdamW over several models, and other rules over GPT-2."""
    rules = [("AdamW", "gpt2", "fp32"), ("AdamW", "gpt2", "bf16"), ("AdamW", "many", "fp32")]
    if not quick:
        rules += [("AdamW", "huge", "fp32"), ("AdamW", "llama", "fp32"), ("AdamW", "llama", "bf16")]
        rules += [("SGD-momentum", "gpt2", "fp32")]
    rules += [("Lion", "gpt2", "fp32")]
    over = models(device, quick)
    return [
        StepCase("rules", chain, *over[model], storage, rounds(device, quick))
        for chain, model, storage in rules
    ]
