"""One optimizer step over GPT-2's 124 M parameters, against the best that torch composes.

The baseline is `clip_grad_norm_` and `torch.optim.AdamW(fused=True)`, with `_foreach_lerp_` for the
average and `randn_like` for the noise.  A row whose results differ from its baseline's prints no number.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fastreg

from . import measure, shapes

CHAINS = ("AdamW", "clip+AdamW", "clip+AdamW+EMA", "clip+noise+AdamW")
MAX_NORM, STD, DECAY = 1e3, 0.01, 0.999


def parameters(sizes: list[tuple[int, ...]], seed: int) -> list[torch.nn.Parameter]:
    """Parameters with gradients."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator)
    return made


def torch_step(chain: str, params: list[torch.nn.Parameter]) -> tuple[Callable[[], None], dict[str, Any]]:
    """The best composition of torch's own parts, and its average."""
    optimizer = torch.optim.AdamW(params, weight_decay=0.1, fused=True)
    averages = [p.detach().clone() for p in params] if "EMA" in chain else []

    @torch.no_grad()
    def step() -> None:
        if "clip" in chain:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        if "noise" in chain:
            for p in params:
                p.grad.add_(torch.randn_like(p.grad), alpha=STD)
        optimizer.step()
        if averages:
            torch._foreach_lerp_(averages, [p.detach() for p in params], 1 - DECAY)

    return step, {"averages": averages}


def fastreg_step(chain: str, params: list[torch.nn.Parameter]) -> tuple[Callable[[], None], dict[str, Any]]:
    """The same in one pass."""
    pieces = {
        "clip": fastreg.ClipNorm(MAX_NORM),
        "noise": fastreg.GradientNoise(STD),
        "EMA": fastreg.EMA(DECAY),
    }
    chosen = [piece for name, piece in pieces.items() if name in chain]
    optimizer = fastreg.AdamW(params, weight_decay=0.1, regularizers=chosen, seed=0)
    return optimizer.step, {"optimizer": optimizer}


def differs(chain: str, sizes: list[tuple[int, ...]]) -> str | None:
    """What is wrong with our result after three steps, if anything: fresh parameters, torch as the judge.

    Noise cannot be compared element by element: there, the gradients are zero and the first moment must
    have the moments of the noise.
    """
    ours, theirs = parameters(sizes, 1), parameters(sizes, 1)
    step, extra = fastreg_step(chain, ours)
    baseline, reference = torch_step(chain, theirs)
    if "noise" in chain:
        for p in ours:
            p.grad.zero_()
        step()
        drawn = torch.cat([extra["optimizer"].state[p]["exp_avg"].flatten() for p in ours]) / (0.1 * STD)
        off = max(abs(drawn.mean().item()), abs(drawn.square().mean().item() - 1))
        return f"noise is off by {off:.1e}" if not off < 6 * (2 / drawn.numel()) ** 0.5 else None
    for _ in range(3):
        step(), baseline()
    pairs = list(zip(ours, theirs, strict=True))
    if reference["averages"]:
        pairs += [
            (extra["optimizer"].state[p]["ema"], a) for p, a in zip(ours, reference["averages"], strict=True)
        ]
    worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    return f"differs by {worst:.1e}" if not worst <= 1e-6 else None


def run(rounds: int, sizes: list[tuple[int, ...]], chains: tuple[str, ...] = CHAINS) -> dict[str, Any]:
    """Measure all chains; one optimizer of each kind at a time is in memory."""
    rows = []
    for chain in chains:
        wrong = differs(chain, sizes[2:14] + sizes[-1:])
        row: dict[str, Any] = {"chain": chain, "wrong": wrong}
        if wrong is None:
            ours, theirs = parameters(sizes, 0), parameters(sizes, 0)
            for a, b in zip(ours, theirs, strict=True):
                a.grad = b.grad
            contenders = {"fastreg": fastreg_step(chain, ours)[0], "torch": torch_step(chain, theirs)[0]}
            timings = measure.interleave(contenders, rounds)
            row |= {name: timing.quantiles() for name, timing in timings.items()}
            row["ratio"] = measure.ratio(timings["fastreg"], timings["torch"])
        rows.append(row)
    total = sum(torch.Size(size).numel() for size in sizes)
    return {
        "machine": asdict(measure.machine()),
        "parameters": total,
        "tensors": len(sizes),
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    machine = result["machine"]
    lines = [
        f"{result['parameters'] / 1e6:.0f} M parameters in {result['tensors']} tensors, fp32, "
        f"{machine['processor']}, {machine['threads']} threads, {machine['instruction_set']}, "
        f"torch {machine['torch']}",
        f"{'chain':<20}{'fastreg ms':>12}{'torch ms':>12}{'times faster':>14}   20-80 % of rounds",
    ]
    for row in result["rows"]:
        if row["wrong"]:
            lines.append(f"{row['chain']:<20}refused: {row['wrong']}")
            continue
        ratio = row["ratio"]
        lines.append(
            f"{row['chain']:<20}{row['fastreg']['median']:>12.1f}{row['torch']['median']:>12.1f}"
            f"{ratio['median']:>14.2f}   {ratio['q20']:.2f}-{ratio['q80']:.2f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m fastreg_benchmarks.step", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds per chain (default 15)")
    parser.add_argument("--layers", type=int, default=12, help="layers of the GPT-2 (default 12)")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(arguments)
    result = run(options.rounds, shapes.gpt2(options.layers))
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(row["wrong"] for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
