"""Keeps the old names `Knob` and `knobs` importable, for one release."""

from .sites import DropoutSite as Knob
from .sites import dropout_sites as knobs

__all__ = ["Knob", "knobs"]
