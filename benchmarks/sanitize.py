"""Every kernel once over few, odd and misaligned tensors, for compute-sanitizer.

    compute-sanitizer --tool memcheck python -m fastreg_benchmarks.sanitize [CHAIN, dropout or private ...]

Without a GPU it runs in Triton's interpreter.  The exit status tells whether results were those of the
reference, too.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterator

import torch
from torch.nn import Parameter

import fastreg
from fastreg.adversarial.ball import Ball
from fastreg.nn import noise_ops, ops, rates
from fastreg.privacy import ghost
from fastreg.reference.noise import KINDS

from . import chains

SIZES = (1, 15, 16, 17, 127, 4096, 4097, 2 * 4096 + 48)
OFFSETS = (0, 1, 3)
DROPOUT, PENALTY, ADVERSARIAL, NOISE = "dropout", "penalty", "adversarial", "noise"
PRIVATE, GHOST = "private", "ghost"


def drawn(count: int, dtype: torch.dtype, device: str) -> Iterator[list[torch.Tensor]]:
    """So many tensors of each size and offset."""
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        for offset in OFFSETS:  # a view into an allocation: what lies around it belongs to nobody
            made = [torch.randn(size + offset, generator=generator) for _ in range(count)]
            yield [t.to(device, dtype)[offset:] for t in made]


def dropped(dtype: torch.dtype, device: str, backend: str) -> list[torch.Tensor]:
    """Dropout with all that is fused around it, and its gradients."""
    found = []
    with fastreg.use_backend(backend):
        for *given, gradient in drawn(4, dtype, device):
            x, bias, residual = (t.requires_grad_() for t in given)
            seed, thresholds = torch.tensor(7, device=device), rates.thresholds(0.3, torch.device(device))
            y = ops.BiasActDropoutAdd.apply(x, bias, residual, seed, thresholds, 1, "gelu")
            found += [y.detach(), *torch.autograd.grad(y, (x, bias, residual), gradient)]
    return [t.cpu().float() for t in found]


def penalised(dtype: torch.dtype, device: str, backend: str) -> list[torch.Tensor]:
    """Both penalties on all tensors, and their gradients."""
    found = []
    params = [Parameter(weight) for (weight,) in drawn(1, dtype, device)]
    with fastreg.use_backend(backend):
        for penalty in (fastreg.l1_penalty, fastreg.l2_penalty):
            value = penalty(params, 0.3)
            found += [value.detach(), *torch.autograd.grad(value, params)]
    return [t.cpu().float() for t in found]


def attacked(dtype: torch.dtype, device: str, backend: str) -> list[torch.Tensor]:
    """A start and a step in every ball, of one sample and of three."""
    found = []
    with fastreg.use_backend(backend):
        for x, gradient in drawn(2, dtype, device):
            for samples in (1, 3):
                whole = len(x) // samples * samples
                inputs, g = (t[:whole].view(samples, -1) for t in (x.sigmoid(), gradient))
                for norm in ("linf", "l2", "l1") if whole else ():
                    ball = Ball(inputs, 0.1, norm, (torch.zeros(inputs.shape[1:], device=device), 1.0))
                    _, point = ball.start(torch.tensor(7, device=device))
                    found += ball.step(point, g, ball.epsilon)
    return [t.cpu().float() for t in found]


def noised(dtype: torch.dtype, device: str, backend: str) -> list[torch.Tensor]:
    """Every kind of noise, of one size and of a size for each row; and noise on weights, there and back."""
    found, params = [], []
    with fastreg.use_backend(backend):
        for (x,) in drawn(1, dtype, device):
            seed, one = torch.tensor(7, device=device), torch.tensor(0.3, device=device)
            for kind in KINDS:
                found.append(noise_ops.noise(x, seed, one, 1, kind))
                for inner in (8, 3):
                    rows = torch.linspace(0.1, 1, len(x) // inner, device=device)
                    found.append(noise_ops.noise(x[: len(rows) * inner], seed, rows, inner, kind))
            params.append(x)
        with fastreg.WeightNoise(params, 0.3, seed=0).perturbed():
            found += [p.clone() for p in params]
        found += params
    return [t.cpu().float() for t in found if t.numel()]


def privately(dtype: torch.dtype, device: str, backend: str) -> list[torch.Tensor]:
    """The weights after two private steps on gradients held per sample, one of which is not finite."""
    found = []
    for clipping in ("flat", "per_layer"):
        params, held = [], []
        for weight, *gradients in drawn(4, dtype, device):
            params.append(Parameter(weight))
            held.append(torch.stack([gradients[0], gradients[1] * torch.inf, gradients[2]]))
        base = chains.optimizer("clip+AdamW", params, lr=0.01, seed=0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="noise_seed")
            optimizer = fastreg.DPOptimizer(
                base, max_grad_norm=5.0, clipping=clipping, expected_batch_size=3, noise_seed=0
            )
        with fastreg.use_backend(backend):
            for _ in range(2):
                for p, samples in zip(params, held, strict=True):
                    p.grad_sample = samples.clone()  # type: ignore[attr-defined]
                optimizer.step()
                optimizer.zero_grad()
        found += [p.detach().cpu().float() for p in params]
    return found


def summed(dtype: torch.dtype, device: str, backend: str) -> list[torch.Tensor]:
    """Ghost norms and sums over positions, below and above a tile."""
    found = []
    with fastreg.use_backend(backend):
        for left, right in drawn(2, dtype, device):
            for samples, positions in ((1, 1), (3, 5), (1, 127)):
                features = len(left) // (samples * positions)
                a, b = (
                    t[: samples * positions * features].view(samples, positions, -1) for t in (left, right)
                )
                if features:
                    mean, deviation = a.float().mean(-1), b.float().abs().mean(-1)
                    found += ghost.ghost_sums(a, b)
                    found += [t for t in ghost.sample_sums(a, b, mean, deviation) if t is not None]
                    found.append(ghost.sample_sums(a)[1])
    return [t.cpu().float() for t in found]


def trained(chain: str, dtype: torch.dtype, device: str, backend: str) -> list[torch.Tensor]:
    """The weights after two steps."""
    params = []
    for weight, gradient in drawn(2, dtype, device):
        params.append(Parameter(weight))
        params[-1].grad = gradient
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
    runs = {
        DROPOUT: dropped, PENALTY: penalised, ADVERSARIAL: attacked, NOISE: noised, PRIVATE: privately,
        GHOST: summed,
    }  # fmt: skip
    by_themselves = (chain for chain in chains.BUDGETS if "dp" not in chain.split("+"))
    for chain in names or (*by_themselves, *runs):
        run = runs.get(chain) or functools.partial(trained, chain)
        for dtype in (torch.float32, torch.bfloat16):
            found, expected = run(dtype, device, "triton"), run(dtype, "cpu", "reference")
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
