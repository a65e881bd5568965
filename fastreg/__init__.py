"""Regularization for PyTorch, fused into Triton kernels."""

from . import adversarial, layerwise, nn, schedules
from .adversarial import FGM, fgsm, pgd
from .backend import use_backend
from .batch_norm import frozen_running_stats, update_bn
from .environment import info
from .nn import NoiseScheduler
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
    WeightNoise,
    get_ema_multi_avg_fn,
    param_groups,
)
from .recipe import Regularization

__version__ = "0.1.0"

__all__ = [
    "EMA", "FGM", "L1", "L2SP", "MSAM", "SAM", "SGD", "SWA", "Adam", "AdamW", "AdaptiveClip", "AveragedModel",
    "ClipNorm", "ClipValue", "GradientNoise", "Lion", "Lookahead", "NoiseScheduler", "Phase", "Piece",
    "Regularization", "SlowWeights", "WeightNoise", "adversarial", "fgsm", "frozen_running_stats",
    "get_ema_multi_avg_fn", "info", "layerwise", "nn", "param_groups", "pgd", "schedules", "update_bn",
    "use_backend",
]  # fmt: skip
