"""The results of contenders: a record of each run, and the mean over the runs of a contender."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

QUANTILE = 0.1
"""Times are reported as this quantile over the steps, not as their median: on a CPU shared with other
programs, medians of the same optimizer, minutes apart, differed by 20 %, this quantile by 4 %."""


@dataclass
class Record:
    """The measurements of a run so far; losses in nats per token, times in seconds."""

    label: str
    summary: str
    seed: int = 0
    steps: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    whole: tuple[float, float] | None = None  # training and validation loss at the end, on all windows
    step_times: list[float] = field(default_factory=list)
    optimizer_times: list[float] = field(default_factory=list)
    peak_memory: int | None = None
    seconds: float = 0.0
    finished: bool = False
    budget: str = ""  # of private training

    @property
    def losses(self) -> tuple[float, float]:
        """Training and validation loss at the end, or at the latest evaluation."""
        return self.whole or (self.train[-1], self.validation[-1])

    @property
    def diverged(self) -> bool:
        """Whether the loss is no longer a number."""
        return not math.isfinite(self.validation[-1])


@dataclass(frozen=True)
class Result:
    """The runs of a contender, which differ in the seed.

    Means and bands are over the finished runs, or over all if none is finished.
    """

    label: str
    summary: str
    records: tuple[Record, ...]

    @property
    def runs(self) -> tuple[Record, ...]:
        """The finished runs, or all if none is finished."""
        return tuple(record for record in self.records if record.finished) or self.records

    @property
    def finished(self) -> bool:
        """Whether at least one run is finished."""
        return any(record.finished for record in self.records)

    @property
    def diverged(self) -> bool:
        """Whether the loss of a run is no longer a number."""
        return any(record.diverged for record in self.runs)

    @property
    def steps(self) -> list[int]:
        """The steps that all runs have evaluated."""
        return min((record.steps for record in self.runs), key=len)

    @property
    def train(self) -> list[float]:
        """The mean curve of the training loss."""
        return _mean_curve([record.train for record in self.runs])

    @property
    def validation(self) -> list[float]:
        """The mean curve of the validation loss."""
        return _mean_curve([record.validation for record in self.runs])

    @property
    def losses(self) -> tuple[float, float]:
        """Means of `Record.losses` over the runs."""
        train, validation = _mean_curve([record.losses for record in self.runs])
        return train, validation

    @property
    def deviations(self) -> tuple[float, float] | None:
        """Standard deviations of both losses over the seeds; `None` for one run."""
        if len(self.runs) < 2:
            return None
        trains, validations = zip(*(record.losses for record in self.runs), strict=True)
        return deviation(trains), deviation(validations)

    @property
    def gap(self) -> float:
        """Validation loss above training loss."""
        return self.losses[1] - self.losses[0]

    @property
    def best(self) -> int:
        """Index of the lowest validation loss."""
        curve = self.validation
        return min(range(len(curve)), key=lambda i: curve[i] if math.isfinite(curve[i]) else math.inf)

    @property
    def step_time(self) -> float:
        """Time of an undisturbed training step."""
        return quantile(self.times("step_times"))

    @property
    def optimizer_time(self) -> float:
        """Time of the optimizer in an undisturbed training step."""
        return quantile(self.times("optimizer_times"))

    @property
    def peak_memory(self) -> int | None:
        """The largest peak of all runs, in bytes."""
        return max((record.peak_memory for record in self.runs if record.peak_memory), default=None)

    def times(self, name: str) -> list[float]:
        """Returns the times of all runs, by the name of the record's list."""
        return [time for record in self.runs for time in getattr(record, name)]


def by_label(records: Sequence[Record]) -> list[Result]:
    """Returns a result for each label, in the order of their first records."""
    labels = dict.fromkeys(record.label for record in records)
    groups = [tuple(record for record in records if record.label == label) for label in labels]
    return [Result(group[0].label, group[0].summary, group) for group in groups]


def quantile(times: Sequence[float], q: float = QUANTILE) -> float:
    """Returns a quantile of times; NaN if there are none."""
    return sorted(times)[int(q * (len(times) - 1))] if times else math.nan


def deviation(values: Sequence[float]) -> float:
    """Returns the standard deviation of at least two values; NaN if one is not finite."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    return [sum(points) / len(points) for points in zip(*curves, strict=False)]
