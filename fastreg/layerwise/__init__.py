"""Dropout of any transformer, layer by layer: find the rates, set them, anneal them, verify them."""

from .apply import remove, restore
from .audit import Audit, audit
from .knobs import ROLES, Knob, knobs
from .scheduler import DropoutScheduler
from .setting import assert_dropout, set_dropout
from .table import Row, Table
from .wrapper import LayerwiseAdaptiveRegularization

__all__ = [
    "ROLES", "Audit", "DropoutScheduler", "Knob", "LayerwiseAdaptiveRegularization", "Row", "Table",
    "assert_dropout", "audit", "knobs", "remove", "restore", "set_dropout",
]  # fmt: skip
