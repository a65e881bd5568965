"""The verdicts, the measurements and the picture, on made-up curves."""

import math

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import torch  # noqa: E402

from fastreg.cli.compare import figure, verdicts  # noqa: E402
from fastreg.cli.compare.results import Record, Result, by_label, quantile  # noqa: E402
from fastreg.cli.measure import PeakMemory, Stopwatch  # noqa: E402


def run(label, validation, step_time=0.01, finished=True, seed=0):
    steps = list(range(0, 10 * len(validation), 10))
    return Record(
        label, label, seed, steps, [value / 2 for value in validation], list(validation), finished=finished,
        step_times=[step_time] * 20, optimizer_times=[step_time / 10] * 20, peak_memory=2**30,
    )  # fmt: skip


def record(label, *arguments, **options):
    return Result(label, label, (run(label, *arguments, **options),))


def seeded(label, *curves):
    return Result(label, label, tuple(run(label, curve, seed=i) for i, curve in enumerate(curves)))


RISING = [5.0, 4.0, 3.0, 2.8, 2.9, 3.0, 3.1, 3.2]
PLAIN = record("plain", RISING)


@pytest.mark.parametrize(
    "curve, step_time, outcome, said",
    [
        (RISING, 0.01, "no clear difference", "step time about the same (+0%)"),
        ([5, 4, 3, 2.8, 2.85, 2.9, 2.95, 3.0], 0.02, "helped", "early (2.80 against 2.80); +10.0 ms"),
        ([5, 4, 3, 2.5, 2.5, 2.5, 2.5, 2.5], 0.005, "helped", "best step, too (2.50 against 2.80); -5.0 ms"),
        ([5, 4.5, 4, 3.9, 3.8, 3.7, 3.6, 3.5], 0.01, "hurt", "0.30 (9%) above plain"),
        ([5, 4, 3, 2.8, 3.1, 2.7, 3.2, 3.0], 0.01, "no clear difference", "within the scatter"),
        ([5, 4, math.nan], 0.01, "diverged", "bad diverged by step 20"),
    ],
)  # fmt: skip
def test_verdicts(curve, step_time, outcome, said):
    (verdict,) = verdicts.verdicts([PLAIN, record("bad", curve, step_time)])
    assert verdict.outcome == outcome
    assert said in verdict.sentence


def test_no_verdict_about_or_against_an_unfinished_run():
    (verdict,) = verdicts.verdicts([PLAIN, record("ema", RISING[:3], finished=False)])
    assert (verdict.outcome, verdict.sentence) == ("stopped", "no verdict: ema was stopped at step 20")
    (verdict,) = verdicts.verdicts([record("ema", RISING), record("plain", RISING[:3], finished=False)])
    assert verdict.sentence == "no verdict: plain was stopped at step 20"


def test_short_curves_of_one_seed_tell_nothing():
    halved = [loss / 2 for loss in RISING]
    (verdict,) = verdicts.verdicts([record("plain", RISING[:6]), record("half", halved[:6])])
    assert (verdict.outcome, verdict.gain) == ("no clear difference", 1.5)
    assert "too short to tell" in verdict.sentence
    (verdict,) = verdicts.verdicts([record("plain", RISING[:7]), record("half", halved[:7])])
    assert verdict.outcome == "helped"


def test_scatter_is_that_of_noise_around_a_trend():
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(4000, generator=generator, dtype=torch.float64)
    curve = (torch.linspace(3, 4, 4000, dtype=torch.float64) + noise).tolist()
    assert verdicts.scatter(record("x", curve)) == pytest.approx(0.1, rel=0.05)
    assert verdicts.scatter(record("x", [3.0, 2.0])) == 0


def test_headline_says_whether_it_overfits_and_what_helped():
    helper = record("ema=1e-3", [5, 4, 3, 2.5, 2.5, 2.5, 2.5, 2.5])
    assert verdicts.headline([PLAIN, helper]) == (
        "plain overfits: its validation loss turns at step 30 and rises from 2.80 to 3.20",
        "helped: ema=1e-3 \N{MINUS SIGN}0.70",
    )
    assert verdicts.headline([record("torch", [3.0, 2.0])]) == ("torch ends at a validation loss of 2.00", "")
    assert verdicts.headline([]) == ("", "")


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record("plain", [3.0])],
        [record("torch", [math.nan])],
        [PLAIN, record("ema", RISING[:3], finished=False), record("x", [5.0, 4.0, math.nan])],
        [seeded("plain", RISING, RISING[:4]), seeded("ema", RISING)],
        [record(f"clip={i}", [value + 1e-3 * i for value in RISING]) for i in range(20)],
    ],
    ids=["nothing", "a point", "nan only", "partial", "seeds", "many"],
)
def test_any_records_can_be_drawn(records, tmp_path):
    figure.draw(tmp_path / "x.png", records, verdicts.headline(records))
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_names_at_the_ends_do_not_overlap():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 1)
    figure._name_ends(
        axes, [(y, 10, f"n{y}", "black") for y in (0.0, 0.01, 0.02, 0.98, 1.0)], 10, 0.0, 1.0, 0.06
    )
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) > 0.055
    assert heights[0] >= 0 and heights[-1] <= 1


def test_as_many_names_as_fit_have_room():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    figure._name_ends(axes, [(0.95 + i / 1000, 10, f"n{i}", "black") for i in range(20)], 10, 0.0, 1.0, 0.05)
    heights = [text.get_position()[1] for text in axes.texts]
    assert heights == pytest.approx([0.025 + i * 0.05 for i in range(20)])


def test_a_curve_far_above_does_not_flatten_the_others():
    curves = [[5.0, 3.0, 2.9 + i / 100] for i in range(5)]
    low, high = figure._range([[0, 50, 100]] * 6, [*curves, [5.0, 9.0, 9.0]], 100)
    assert low < 2.9 and 3.0 < high < 3.1


def test_seeds_decide_by_the_differences_of_pairs():
    """Seeds differ by more than what helps, but it helps with each of them."""
    starts = (3.0, 3.4, 3.8)
    base = seeded("plain", *([5.0, start] for start in starts))
    (verdict,) = verdicts.verdicts([base, seeded("ema", *([5.0, s - 0.1 - 0.01 * s] for s in starts))])
    assert verdict.outcome == "helped" and verdict.gain == pytest.approx(0.134)
    assert "0.13 (4%) below plain over 3 seeds" in verdict.sentence
    (verdict,) = verdicts.verdicts([base, seeded("noise", [5.0, 2.5], [5.0, 3.9], [5.0, 3.3])])
    assert verdict.outcome == "no clear difference"
    # t for 2 degrees of freedom, times the standard deviation of 0.5, -0.5, 0.5 over the root of 3
    assert "over 3 seeds, within the scatter of ±1.43" in verdict.sentence


def test_a_result_of_several_seeds():
    one, two = run("ema", [5.0, 3.0, 2.0]), run("ema", [5.0, 2.0, 4.0], seed=1)
    result = by_label([one, run("plain", [5.0]), two])[0]
    assert result.losses == (1.5, 3.0) and result.deviations == pytest.approx((2**-0.5, 2**0.5))
    assert result.validation == [5.0, 2.5, 3.0] and result.best == 1 and result.steps == [0, 10, 20]
    stopped = run("ema", [5.0, 9.0], finished=False, seed=2)
    assert by_label([one, two, stopped])[0].losses == (1.5, 3.0), "what is not finished does not count"
    assert by_label([one])[0].deviations is None


def test_quantile_is_one_of_the_times():
    assert quantile([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]) == 2.0
    assert quantile([3.0]) == 3.0
    assert math.isnan(quantile([]))


def test_stopwatch_adds_up_and_starts_anew(monkeypatch):
    now = iter([1.0, 1.5, 10.0, 10.25, 20.0, 21.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch:
            pass
    assert watch.take() == 0.75
    with watch:
        pass
    assert watch.take() == 1.0


def test_peak_memory_sees_an_allocation_and_forgets_it():
    memory = PeakMemory(torch.device("cpu"))
    if "VmHWM" not in memory.method:
        pytest.skip(f"no peak that can be reset here: {memory.method}")
    memory.reset()
    before = memory.bytes()
    torch.ones(2**24)  # 64 MiB
    assert memory.bytes() - before > 60 * 2**20
    memory.reset()
    assert memory.bytes() - before < 30 * 2**20
