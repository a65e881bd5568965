"""Keeps results of a stage in a JSON file that is complete at every moment, however the stage ends."""

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
"""Start of the printed line about earlier results that are not continued."""


class Ledger:
    """Results of a stage: named rows in a JSON file, which is written after each new row.

    An existing file is continued if it is `resumable`: rows that have succeeded are kept.

    Args:
        path: The file.
        about: Other entries of the file, such as the machine; the version of the kernels is added.
        again: Whether to start without the rows of an existing file.
        interval: Fewest seconds between two writes, for many small rows.
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
        """Makes an interrupt (SIGINT) end the block, after the file is written.

        If a library catches the exception, the block ends when the running `attempt` does.
        """

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
        """Returns the names whose rows are missing or have not succeeded, in the same order."""
        return [name for name in names if name not in self.rows or not settled(self.rows[name])]

    def add(self, name: str, row: Row) -> None:
        """Adds a row, or replaces it, and writes the file if the interval has passed."""
        self.rows[name] = row
        if time.perf_counter() - self._written >= self._interval:
            self.write()

    def attempt(self, name: str, work: Callable[[], Row]) -> Row:
        """Runs a function, then adds and returns its row, or a row that says how it failed."""
        start = time.perf_counter()
        try:
            row = work()
        except Exception as error:
            row = {
                "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}",
                "trace": traceback.format_exc()[-4000:],
            }
        if self._interrupted:  # even if a library caught the exception
            raise KeyboardInterrupt
        self.add(name, {**row, "seconds": time.perf_counter() - start})
        return row

    def write(self, complete: bool = False) -> None:
        """Writes all rows to the file.

        Args:
            complete: Whether all rows of the stage have been tried.
        """
        self._written = time.perf_counter()
        seconds = self._before + time.perf_counter() - self._start
        document.write(
            self.path, {**self._about, "complete": complete, "seconds": seconds, "rows": self.rows}
        )


def failed(row: Row) -> bool:
    """Returns whether a row reports a failure or a wrong result."""
    return "failed" in row or "wrong" in row


def settled(row: Row) -> bool:
    """Returns whether a row is final: it has neither failed nor been skipped."""
    return not failed(row) and "skipped" not in row and row.get("outcome") != "skipped"


def version() -> str:
    """Returns a short digest of triton's version and of the sources of fastreg and its kernels."""
    return kernel_cache.identity()[:12]


def resumable(path: Path, what: str, kind: type, about: Row, again: bool) -> Row:
    """Returns the document in a file if new results may be added to it, else an empty one.

    It must be of the same machine and version, and both or neither must be of a dry run.  Any other document
    is renamed to `<name>.old-<number>.json`, and a line is printed.

    Args:
        path: The file.
        what: Key that the document must have.
        kind: Type of the value of this key.
        about: Machine and version of the new results, and whether they are of a dry run.
        again: Whether to continue no document.
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
    """Returns the values that all results in one file must have in common."""
    return {
        "--dry": about.get("dry"),
        "machine": about.get("machine", {}).get("device"),
        "version of fastreg or triton": about.get("version"),
    }


def read(path: Path, what: str, kind: type) -> Row:
    """Returns the document in a file, or an empty one unless its key `what` holds a value of type `kind`."""
    try:
        contents = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return contents if isinstance(contents, dict) and isinstance(contents.get(what), kind) else {}
