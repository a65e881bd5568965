"""Keeps the former names of `sites` importable, for one release."""

from .sites import DropoutSite as Knob
from .sites import dropout_sites as knobs

__all__ = ["Knob", "knobs"]
