"""Regularization for PyTorch, fused into Triton kernels."""

from . import adversarial, layerwise, loops, nn, privacy, schedules
from .adversarial import FGM, fgsm, pgd
from .common.batch_norm import frozen_running_stats, update_bn
from .losses import l1_penalty, l2_penalty, r_drop, r_drop_loss
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
    Component,
    GradientNoise,
    Lion,
    Lookahead,
    Phase,
    SlowWeights,
    WeightNoise,
    get_ema_multi_avg_fn,
    param_groups,
)
from .privacy import DPOptimizer
from .recipe import Regularization
from .runtime.backend import use_backend
from .runtime.environment import info

__version__ = "0.1.0"

__all__ = [
    "EMA", "FGM", "L1", "L2SP", "MSAM", "SAM", "SGD", "SWA", "Adam", "AdamW", "AdaptiveClip",
    "AveragedModel", "ClipNorm", "ClipValue", "DPOptimizer", "GradientNoise", "Lion", "Lookahead",
    "NoiseScheduler", "Phase", "Component", "Regularization", "SlowWeights", "WeightNoise", "adversarial",
    "fgsm", "frozen_running_stats", "get_ema_multi_avg_fn", "info", "l1_penalty", "l2_penalty",
    "layerwise", "loops", "nn", "param_groups", "pgd", "privacy", "r_drop", "r_drop_loss", "schedules",
    "update_bn", "use_backend",
]  # fmt: skip
