"""Finds, sets, schedules and checks the dropout rates of any transformer, layer by layer."""

from .audit import Audit, audit
from .knobs import Knob, knobs  # aliases for one release
from .scheduler import DropoutScheduler
from .set_rates import assert_dropout, set_dropout
from .sites import ROLES, DropoutSite, dropout_sites
from .table import DropoutRow, DropoutTable, Row, Table
from .wrapper import LayerwiseAdaptiveRegularization
from .write_rates import remove, restore

__all__ = [
    "ROLES", "Audit", "DropoutRow", "DropoutScheduler", "DropoutSite", "DropoutTable", "Knob",
    "LayerwiseAdaptiveRegularization", "Row", "Table", "assert_dropout", "audit", "dropout_sites", "knobs",
    "remove", "restore", "set_dropout",
]  # fmt: skip
