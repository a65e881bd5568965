"""Privacy audits: what an attacker who sees the noised sums can prove, against what is claimed.

Canaries are samples whose gradients lie along an axis each.  Which of them are in the batch is tossed; the
attacker guesses from the step.  Guesses that are too good prove that less noise was added, or more signal let
through, than is claimed.  Variants that are broken on purpose must fail.
"""

import math

import pytest
import torch
from scipy import stats

import fastreg
from fastreg.privacy import DPOptimizer, epsilon
from fastreg.privacy.grad_sources import GradSampleSource
from fastreg.privacy.noise import PrivateNoise

pytestmark = pytest.mark.filterwarnings("ignore:noise_seed")

C = 1.0
LENGTH = 5.0
"""Of the gradients before clipping."""


def observed(canaries, sigma, steps=1, broken=None, seed=0, monkeypatch=None):
    """A step on the noised sum of one-hot gradients, and whose were in: `[canaries]` each."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(canaries, generator=generator) < 0.5
    p = torch.nn.Parameter(torch.zeros(canaries))
    optimizer = DPOptimizer(
        fastreg.SGD([p], lr=1.0), noise_multiplier=sigma, max_grad_norm=C, loss_reduction="sum",
        noise_seed=seed + 1,
    )  # fmt: skip
    sums = torch.where(present, LENGTH, 0.0)  # Σ of one-hot gradients, and clipped, as each has an axis

    def keep(self, parameters):
        factor = 1.0 if broken == "no clipping" else C / LENGTH
        if broken == "batch clipping":
            factor = min(1.0, C / float(sums.norm() / (canaries / 2)))  # of the mean, to C
        p.summed_grad = sums * factor

    monkeypatch.setattr(GradSampleSource, "accumulate", keep)
    if broken in ("half the noise", "nine tenths of the noise"):
        share = 0.5 if broken == "half the noise" else 0.9
        numbers = PrivateNoise.step_scalars
        monkeypatch.setattr(
            PrivateNoise, "step_scalars", lambda *a: (share * numbers(*a)[0], *numbers(*a)[1:])
        )
    seen = []
    for step in range(steps):
        if broken == "the same noise" and step:
            optimizer._mechanism.noise.count = 0
            sums = torch.zeros(canaries)  # a step on other samples shows the noise by itself
        before = p.detach().clone()
        optimizer.step()
        seen.append(before - p.detach())
    if broken == "the same noise":
        return seen[0] - seen[1], present
    return sum(seen) / steps, present


def proven(canaries, correct, guesses, delta):
    """The largest ε that so many correct guesses refute with 95 % confidence  (Steinke et al. 2023)."""

    def refuted(eps):
        chance = math.exp(eps) / (1 + math.exp(eps))
        tail = stats.binom.sf(correct - 1, guesses, chance)
        terms = ((stats.binom.sf(correct - i - 1, guesses, chance) - tail) / i for i in range(1, correct + 1))
        return tail + 2 * canaries * delta * max(max(terms), 0.0) < 0.05

    low, high = 0.0, 20.0
    if not refuted(low):
        return 0.0
    while high - low > 1e-2:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def one_run(monkeypatch, **options):
    """ε that one run proves, guessing the canaries that stand out most."""
    canaries = 4000
    seen, present = observed(canaries, 1.0, monkeypatch=monkeypatch, **options)
    best = 0.0
    order = seen.argsort()
    for guesses in (100, 200, 400, 800):
        out, into = order[: guesses // 2], order[-guesses // 2 :]
        correct = int(present[into].sum() + (~present[out]).sum())
        best = max(best, proven(canaries, correct, guesses, 1e-5))
    return best


CLAIMED = 4.3772
"""ε of a full batch with σ = 1 at δ = 1e-5."""


def test_the_claim():
    result = epsilon(
        noise_multiplier=1.0, sample_rate=1.0, steps=1, delta=1e-5, accountant="pld", backend="dp_accounting"
    )
    assert math.isclose(result, CLAIMED, abs_tol=1e-3)


def test_one_run_does_not_refute_the_claim(monkeypatch):
    assert 1.0 < one_run(monkeypatch) < CLAIMED


@pytest.mark.parametrize("broken", ["no clipping", "batch clipping", "the same noise"])
def test_one_run_refutes(broken, monkeypatch):
    assert one_run(monkeypatch, broken=broken, steps=2 if broken == "the same noise" else 1) > CLAIMED


def distance(monkeypatch, **options):
    """μ of Gaussian differential privacy that the coordinates prove with 95 % confidence, each by itself."""
    sigma, runs = 2.0, 20000
    seen, present = observed(runs, sigma, monkeypatch=monkeypatch, **options)
    best = 0.0
    for threshold in torch.linspace(-2, 3, 21).tolist():
        guessed = seen > threshold
        false_positive = _upper(int((guessed & ~present).sum()), int((~present).sum()))
        false_negative = _upper(int((~guessed & present).sum()), int(present.sum()))
        best = max(best, stats.norm.isf(false_positive) - stats.norm.ppf(false_negative))
    return best


def _upper(count, total):
    """Clopper–Pearson, for 21 thresholds with two errors each."""
    return stats.beta.ppf(1 - 0.05 / 42, count + 1, max(total - count, 1))


def test_coordinates_do_not_refute_the_claim(monkeypatch):
    """μ = C / (σ C) = 0.5."""
    assert 0.35 < distance(monkeypatch) <= 0.5


@pytest.mark.parametrize("broken", ["no clipping", "half the noise", "the same noise"])
def test_coordinates_refute(broken, monkeypatch):
    assert distance(monkeypatch, broken=broken, steps=2 if broken == "the same noise" else 1) > 0.5
