"""Optimizers that run all their regularizers in one pass over memory."""

from .adamw import AdamW
from .lion import Lion
from .piece import Phase, Piece
from .regularizers import EMA, ClipNorm, GradientNoise
from .sgd import SGD

__all__ = ["EMA", "SGD", "AdamW", "ClipNorm", "GradientNoise", "Lion", "Phase", "Piece"]
