"""Regularization for PyTorch, fused into Triton kernels."""

from . import layerwise, nn, schedules
from .backend import use_backend
from .batch_norm import frozen_running_stats, update_bn
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
    AveragedModel,
    ClipNorm,
    ClipValue,
    GradientNoise,
    Lion,
    Lookahead,
    Phase,
    Piece,
    SlowWeights,
    get_ema_multi_avg_fn,
    param_groups,
)
from .recipe import Regularization

__version__ = "0.1.0"

__all__ = [
    "EMA", "L1", "L2SP", "MSAM", "SAM", "SGD", "SWA", "Adam", "AdamW", "AdaptiveClip", "AveragedModel",
    "ClipNorm", "ClipValue", "GradientNoise", "Lion", "Lookahead", "Phase", "Piece", "Regularization",
    "SlowWeights", "frozen_running_stats", "get_ema_multi_avg_fn", "info", "layerwise", "nn", "param_groups",
    "schedules", "update_bn", "use_backend",
]  # fmt: skip
