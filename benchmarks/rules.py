"""Update rules alone: what one launch for all tensors, or one compiled pass, makes of them."""

from __future__ import annotations

import torch

from .steps import StepCase, models, rounds
from .suite import Case


def cases(device: torch.device, quick: bool) -> list[Case]:
    """AdamW over every shape; the other rules over GPT-2."""
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
