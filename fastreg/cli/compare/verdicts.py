"""Judges whether each contender helped, and sums it up in two lines."""

import math
from dataclasses import dataclass

from .results import Result, deviation

SLIGHT = 0.005
"""Differences below this share of the baseline's loss are never called one."""

POINTS = 7
"""Fewest points of a curve from which its scatter is estimated."""

NAMED = 6
"""Most contenders that the headline names."""

SLIGHT_TIME = 0.05
"""Differences below this share of the baseline's step time are within what a busy machine adds."""

T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Student's t, two-sided, for 1, 2, ... degrees of freedom: how far means of few seeds may be off."""


@dataclass(frozen=True)
class Verdict:
    """Whether a contender helped; `outcome` is helped, hurt, no clear difference, diverged or stopped."""

    label: str
    outcome: str
    sentence: str
    gain: float = 0.0


def baseline(results: list[Result]) -> Result:
    """Returns the result that others are compared with: plain, else torch, else the first."""
    named = {result.label: result for result in results}
    return named.get("plain") or named.get("torch") or results[0]


def verdicts(results: list[Result]) -> list[Verdict]:
    """Returns a verdict for each contender but the baseline."""
    if not results:
        return []
    base = baseline(results)
    return [_verdict(result, base) for result in results if result is not base]


def _verdict(result: Result, base: Result) -> Verdict:
    for which in (result, base):
        if not which.finished or which.diverged:
            outcome, how = ("diverged", "diverged by") if which.finished else ("stopped", "was stopped at")
            sentence = f"no verdict: {which.label} {how} step {which.steps[-1]}"
            return Verdict(result.label, outcome, sentence)
    loss, reference = result.losses[1], base.losses[1]
    best, best_reference = result.validation[result.best], base.validation[base.best]
    gain = reference - loss
    chance, seeds = _chance(result, base)
    clear = max(chance, SLIGHT * reference)
    cost = _cost(result, base)
    over = f" over {seeds} seeds" if seeds > 1 else ""
    if abs(gain) < clear:
        within = f"within the scatter of ±{clear:.2f}"
        if math.isinf(clear):
            within = "from curves too short to tell: more steps, a lower --eval-every, or --seeds"
        sentence = f"val loss {loss:.2f} against {reference:.2f}{over}, {within}; {cost}"
        return Verdict(result.label, "no clear difference", sentence, gain)
    way = "below" if gain > 0 else "above"
    sentence = f"val loss {loss:.2f}, {abs(gain):.2f} ({abs(gain) / reference:.0%}) {way} {base.label}{over}"
    if gain > 0:
        early = f"no better than stopping {base.label} early"
        ahead = "ahead at the best step, too" if best_reference - best > clear else early
        sentence += f"; {ahead} ({best:.2f} against {best_reference:.2f})"
    return Verdict(result.label, "helped" if gain > 0 else "hurt", f"{sentence}; {cost}", gain)


def _chance(result: Result, base: Result) -> tuple[float, int]:
    """Returns by how much final losses may differ by chance, and from how many seeds this is known.

    Seeds that both were trained with give differences of pairs, whose mean has a confidence interval of 95 %.
    With one seed, the scatter of the curves serves instead. The result is infinite if neither is known.
    """
    there = {record.seed: record.losses[1] for record in base.runs}
    gains = [there[record.seed] - record.losses[1] for record in result.runs if record.seed in there]
    if len(gains) < 2:
        if min(len(result.validation), len(base.validation)) < POINTS:
            return math.inf, 1
        return 2 * math.hypot(scatter(result), scatter(base)), 1
    return T95[min(len(gains) - 2, len(T95) - 1)] * deviation(gains) / math.sqrt(len(gains)), len(gains)


def scatter(result: Result) -> float:
    """Returns the standard deviation of the second half of the validation curve around a smooth one.

    It is estimated from second differences: those of a linear trend are 0, and those of independent noise
    have √6 times its standard deviation.
    """
    curve = result.validation
    tail = curve[len(curve) // 2 :]
    bends = [a - 2 * b + c for a, b, c in zip(tail, tail[1:], tail[2:], strict=False)]
    return math.sqrt(sum(bend * bend for bend in bends) / (6 * len(bends))) if bends else 0.0


def _cost(result: Result, base: Result) -> str:
    more = result.step_time - base.step_time
    if abs(more) < SLIGHT_TIME * base.step_time:
        return f"step time about the same ({more / base.step_time:+.0%})"
    return f"{1e3 * more:+.1f} ms per step ({more / base.step_time:+.0%})"


def headline(results: list[Result]) -> tuple[str, str]:
    """Returns two lines: what happens to the baseline, and which contenders help."""
    if not results:
        return "", ""
    base = baseline(results)
    last, best = base.validation[-1], base.validation[base.best]
    if last - best > max(2 * scatter(base), SLIGHT * best):
        first = (
            f"{base.label} overfits: its validation loss turns at step {base.steps[base.best]} "
            f"and rises from {best:.2f} to {last:.2f}"
        )
    else:
        verb = "ends" if base.finished else "was stopped"
        first = f"{base.label} {verb} at a validation loss of {last:.2f}"
    minus = "\N{MINUS SIGN}"
    helpers = sorted(
        (verdict for verdict in verdicts(results) if verdict.outcome == "helped"), key=lambda v: -v.gain
    )
    named = [f"{v.label} {minus}{v.gain:.2f}" for v in helpers[:NAMED]]
    named += [f"{len(helpers) - NAMED} more"] * (len(helpers) > NAMED)
    return first, f"helped: {', '.join(named)}" if named else ""
