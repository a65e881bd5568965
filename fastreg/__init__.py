"""Regularization for PyTorch, fused into Triton kernels."""

from .backend import use_backend
from .environment import info
from .optim import (
    EMA,
    L1,
    L2SP,
    MSAM,
    SAM,
    SGD,
    SWA,
    Adam,
    AdamW,
    AdaptiveClip,
    ClipNorm,
    ClipValue,
    GradientNoise,
    Lion,
    Lookahead,
    Phase,
    Piece,
    SlowWeights,
    param_groups,
)

__version__ = "0.1.0"

__all__ = [
    "EMA", "L1", "L2SP", "MSAM", "SAM", "SGD", "SWA", "Adam", "AdamW", "AdaptiveClip", "ClipNorm",
    "ClipValue", "GradientNoise", "Lion", "Lookahead", "Phase", "Piece", "SlowWeights",
    "info", "param_groups", "use_backend",
]  # fmt: skip
