"""Results of a stage as JSON that is whole at every moment: whatever ends a stage, what it had is on disk."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fastreg.cli import document
from fastreg.runtime import kernel_cache

Row = dict[str, Any]
EARLIER = "earlier results"
"""How the line begins that tells of results that are not gone on with."""


class Ledger:
    """Rows by name, written to a file after each.

    A file that is there already is gone on with if it is `resumable`: what has succeeded is not done again.

    Args:
        path: The file.
        about: What else it tells, such as the machine, besides the version of the kernels.
        again: Whether to do all of it anew.
        interval: Seconds between two writes at least, for many small rows.
    """

    def __init__(self, path: Path, about: Row, again: bool = False, interval: float = 0.0) -> None:
        self.path, self._start, self._interval, self._written = path, time.perf_counter(), interval, 0.0
        self._about = {**about, "version": version()}
        previous = resumable(path, "rows", dict, self._about, again)
        self._interrupted = False
        self.rows: dict[str, Row] = previous.get("rows", {})
        self._before = previous.get("seconds", 0.0)
        self.write()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within the block an interrupt ends what is attempted, also where a library catches it."""

        def interrupt(*_: object) -> None:
            self._interrupted = True
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        except BaseException:
            self.write()
            raise
        finally:
            signal.signal(signal.SIGINT, before)

    def pending(self, names: Iterable[str]) -> list[str]:
        """Those that have not succeeded yet, in their order."""
        return [name for name in names if name not in self.rows or not settled(self.rows[name])]

    def add(self, name: str, row: Row) -> None:
        """Write a row down."""
        self.rows[name] = row
        if time.perf_counter() - self._written >= self._interval:
            self.write()

    def attempt(self, name: str, work: Callable[[], Row]) -> Row:
        """Do something and write down what it gives, or how it failed."""
        start = time.perf_counter()
        try:
            row = work()
        except Exception as error:
            row = {
                "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}",
                "trace": traceback.format_exc()[-4000:],
            }
        if self._interrupted:  # whatever became of the exception
            raise KeyboardInterrupt
        self.add(name, {**row, "seconds": time.perf_counter() - start})
        return row

    def write(self, complete: bool = False) -> None:
        """Bring the file up to date.

        Args:
            complete: Whether all that there was to do has been tried.
        """
        self._written = time.perf_counter()
        seconds = self._before + time.perf_counter() - self._start
        document.write(
            self.path, {**self._about, "complete": complete, "seconds": seconds, "rows": self.rows}
        )


def failed(row: Row) -> bool:
    """Whether a row tells of something that did not work."""
    return "failed" in row or "wrong" in row


def settled(row: Row) -> bool:
    """Whether a row tells of something that need not be done again: it has not failed, nor been skipped."""
    return not failed(row) and "skipped" not in row and row.get("outcome") != "skipped"


def version() -> str:
    """What all results of a file are about: fastreg and its kernels as they are now, and triton."""
    return kernel_cache.identity()[:12]


def resumable(path: Path, what: str, kind: type, about: Row, again: bool) -> Row:
    """The document in a file, if it is of the same machine and version, and dry like this one or not.

    Any other is moved beside, to `<name>.old-<number>.json`, and a line says so.

    Args:
        path: The file.
        what: What it must hold.
        kind: And of which type.
        about: What tells the machine and the version of the results to come.
        again: Whether to go on with none.
    """
    previous = read(path, what, kind)
    if not previous:
        return {}
    before, now = _source(previous), _source(about)
    other = [name for name in now if before[name] != now[name]]
    if not other and not again:
        return previous
    names = (path.with_name(f"{path.stem}.old-{i}{path.suffix}") for i in itertools.count(1))
    beside = next(name for name in names if not name.exists())
    path.rename(beside)
    why = f" differ in {', '.join(other)} and" if other else ""
    print(f"{EARLIER} in {path.name}{why} are kept in {beside.name}: all is done anew", flush=True)
    return {}


def _source(about: Row) -> Row:
    """What results must have in common to stand in one file."""
    return {
        "--dry": about.get("dry"),
        "machine": about.get("machine", {}).get("device"),
        "version of fastreg or triton": about.get("version"),
    }


def read(path: Path, what: str, kind: type) -> Row:
    """The document in a file, if there is one that holds results of this kind."""
    try:
        contents = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return contents if isinstance(contents, dict) and isinstance(contents.get(what), kind) else {}
