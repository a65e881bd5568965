"""Optimizers that run all their regularizers in one pass over memory."""

from .adam import Adam, AdamW
from .averages import EMA, SWA, SlowWeights
from .groups import param_groups
from .lion import Lion
from .piece import Phase, Piece
from .regularizers import L1, L2SP, AdaptiveClip, ClipNorm, ClipValue, GradientNoise
from .sgd import SGD

__all__ = [
    "EMA", "L1", "L2SP", "SGD", "SWA", "Adam", "AdamW", "AdaptiveClip", "ClipNorm", "ClipValue",
    "GradientNoise", "Lion", "Phase", "Piece", "SlowWeights", "param_groups",
]  # fmt: skip
