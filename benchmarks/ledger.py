"""Results of a stage as JSON that is whole at every moment: whatever ends a stage, what it had is on disk."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastreg import kernel_cache
from fastreg.cli import document

Row = dict[str, Any]


class Ledger:
    """Rows by name, written to a file after each.

    A file that is there already is gone on with: what has succeeded there is not done again.

    Args:
        path: The file.
        about: What else it tells, such as the machine.
        again: Whether to do all of it anew.
        every: Seconds between two writes at least, for many small rows.
    """

    def __init__(self, path: Path, about: Row, again: bool = False, every: float = 0.0) -> None:
        self.path, self._start, self._every, self._written = path, time.perf_counter(), every, 0.0
        former = {} if again else read(path, "rows", dict)
        self.rows: dict[str, Row] = former.get("rows", {})
        self._before = former.get("seconds", 0.0)
        self._about = about
        self.write()

    def pending(self, names: Iterable[str]) -> list[str]:
        """Those that have not succeeded yet, in their order."""
        return [name for name in names if name not in self.rows or failed(self.rows[name])]

    def add(self, name: str, row: Row) -> None:
        """Write a row down, with the version of the kernels that it is about."""
        self.rows[name] = {**row, "version": kernel_cache.identity()[:12]}
        if time.perf_counter() - self._written >= self._every:
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


def read(path: Path, what: str, kind: type) -> Row:
    """The document in a file, if there is one that holds results of this kind."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get(what), kind) else {}
