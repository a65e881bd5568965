"""Keeps the names of `sites` before version 0.2 importable, for one release."""

from .sites import DropoutSite as Knob
from .sites import dropout_sites as knobs

__all__ = ["Knob", "knobs"]
