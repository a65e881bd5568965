"""The verdicts, the measurements and the picture, on made-up curves."""

import math

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import torch  # noqa: E402

from fastreg.cli import figure, report  # noqa: E402
from fastreg.cli.measure import PeakMemory, Stopwatch  # noqa: E402
from fastreg.cli.training import Record, quantile  # noqa: E402


def record(label, validation, step_time=0.01, finished=True):
    steps = list(range(0, 10 * len(validation), 10))
    return Record(
        label, label, steps, [value / 2 for value in validation], list(validation), finished=finished,
        step_times=[step_time] * 20, optimizer_times=[step_time / 10] * 20, peak_memory=2**30,
    )  # fmt: skip


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
    (verdict,) = report.verdicts([PLAIN, record("bad", curve, step_time)])
    assert verdict.outcome == outcome
    assert said in verdict.sentence


def test_no_verdict_about_or_against_an_unfinished_run():
    (verdict,) = report.verdicts([PLAIN, record("ema", RISING[:3], finished=False)])
    assert (verdict.outcome, verdict.sentence) == ("stopped", "no verdict: ema was stopped at step 20")
    (verdict,) = report.verdicts([record("ema", RISING), record("plain", RISING[:3], finished=False)])
    assert verdict.sentence == "no verdict: plain was stopped at step 20"


def test_scatter_is_that_of_noise_around_a_trend():
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(4000, generator=generator, dtype=torch.float64)
    curve = (torch.linspace(3, 4, 4000, dtype=torch.float64) + noise).tolist()
    assert report.scatter(record("x", curve)) == pytest.approx(0.1, rel=0.05)
    assert report.scatter(record("x", [3.0, 2.0])) == 0


def test_headline_says_whether_it_overfits_and_what_helped():
    helper = record("ema=1e-3", [5, 4, 3, 2.5, 2.5, 2.5, 2.5, 2.5])
    assert report.headline([PLAIN, helper]) == (
        "plain overfits: its validation loss turns at step 30 and rises from 2.80 to 3.20",
        "helped: ema=1e-3 \N{MINUS SIGN}0.70",
    )
    assert report.headline([record("torch", [3.0, 2.0])]) == ("torch ends at a validation loss of 2.00", "")
    assert report.headline([]) == ("", "")


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record("plain", [3.0])],
        [record("torch", [math.nan])],
        [PLAIN, record("ema", RISING[:3], finished=False), record("x", [5.0, 4.0, math.nan])],
        [record(f"clip={i}", [value + 1e-3 * i for value in RISING]) for i in range(20)],
    ],
    ids=["nothing", "a point", "nan only", "partial", "many"],
)
def test_any_records_can_be_drawn(records, tmp_path):
    figure.draw(tmp_path / "x.png", records, report.headline(records))
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_names_at_the_ends_do_not_overlap():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 1)
    figure._name_ends(axes, [(y, 10, f"n{y}", "black") for y in (0.0, 0.01, 0.02, 0.98, 1.0)], 10, 0.0, 1.0)
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) > 0.055
    assert heights[0] >= 0


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
