"""What took effect, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, overload


class Row(NamedTuple):
    """One rate.

    Attributes:
        path: Where it is, as in `Knob.path`.
        role: What it drops.
        layer: The index of its block in its stack, or `None` outside of blocks.
        rate: The rate.
        how: `"module"`: a module of `fastreg.nn`; `"float"`: a number of the model, handed to a function;
            `"injected"`: a module that was not there; `"config"`: a value of the configuration.
        stack: The name of the list of blocks.
    """

    path: str
    role: str
    layer: int | None
    rate: float
    how: str
    stack: str = ""


class Table(Sequence[Row]):
    """Rows, in the order of the model.  `print` shows them aligned."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = tuple(rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Table: ...
    def __getitem__(self, index: int | slice) -> Row | Table:
        return Table(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Table) and self._rows == other._rows

    def __hash__(self) -> int:
        return hash(self._rows)

    def __repr__(self) -> str:
        return f"Table({list(self._rows)!r})"

    def __str__(self) -> str:
        lines = [("path", "role", "layer", "rate", "how")]
        for row in self:
            layer = "-" if row.layer is None else str(row.layer)
            lines.append((row.path, row.role, layer, f"{row.rate:g}", row.how))
        return aligned(lines)

    @property
    def rates(self) -> dict[str, float]:
        """The rates by path."""
        return {row.path: row.rate for row in self}

    def at(self, rates: Mapping[str, float]) -> Table:
        """The same places with other rates, given by path."""
        return Table([row._replace(rate=rates[row.path]) for row in self])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as plain text, in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
