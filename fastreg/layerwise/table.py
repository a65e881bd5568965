"""Lists the dropout rates of a model as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class DropoutRow(NamedTuple):
    """One dropout rate of a model.

    Attributes:
        path: The path of its site, see `DropoutSite.path`.
        role: The role of its site, one of `ROLES`.
        layer: The index of its block in the stack, or `None` outside of blocks.
        rate: The rate.
        how: `"module"`: a module of `fastreg.nn`; `"float"`: a number of the model, passed to a function;
            `"injected"`: a module that was added; `"config"`: a value of the configuration.
        stack: The name of the list of blocks.
    """

    path: str
    role: str
    layer: int | None
    rate: float
    how: str
    stack: str = ""


class DropoutTable(tuple[DropoutRow, ...]):
    """The dropout rates of a model, one row each, in the order of its modules; `print` aligns them."""

    def __getitem__(self, index: Any) -> Any:
        item = super().__getitem__(index)
        return DropoutTable(item) if isinstance(index, slice) else item

    def __repr__(self) -> str:
        return f"DropoutTable({list(self)!r})"

    def __str__(self) -> str:
        lines = [("path", "role", "layer", "rate", "how")]
        for row in self:
            layer = "-" if row.layer is None else str(row.layer)
            lines.append((row.path, row.role, layer, f"{row.rate:g}", row.how))
        return aligned(lines)

    @property
    def rates(self) -> dict[str, float]:
        """The rates of all rows by path."""
        return {row.path: row.rate for row in self}

    def at(self, rates: Mapping[str, float]) -> DropoutTable:
        """Returns the same rows with other rates, by path."""
        return DropoutTable([row._replace(rate=rates[row.path]) for row in self])


Row, Table = DropoutRow, DropoutTable  # aliases for one release


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Formats lines of cells as plain text, in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
