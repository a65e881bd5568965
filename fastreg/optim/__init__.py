"""Optimizers that run all their regularizers in one pass over memory."""

from ..engine.component import Component, Phase
from .adam import Adam, AdamW
from .averaged_model import AveragedModel, get_ema_multi_avg_fn
from .groups import param_groups
from .lion import Lion
from .lookahead import Lookahead
from .msam import MSAM
from .regularizers import L1, L2SP, AdaptiveClip, ClipNorm, ClipValue, GradientNoise
from .sam import SAM
from .sgd import SGD
from .weight_averages import EMA, SWA, SlowWeights
from .weight_noise import WeightNoise

__all__ = [
    "EMA", "L1", "L2SP", "MSAM", "SAM", "SGD", "SWA", "Adam", "AdamW", "AdaptiveClip", "AveragedModel",
    "ClipNorm", "ClipValue", "GradientNoise", "Lion", "Lookahead", "Phase", "Component", "SlowWeights",
    "WeightNoise", "get_ema_multi_avg_fn", "param_groups",
]  # fmt: skip
