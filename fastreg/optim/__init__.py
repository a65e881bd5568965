"""Optimizers that run all their regularizers in one pass over memory."""

from ..engine.component import Component, Phase
from . import registry, regularizers
from .averaged_model import AveragedModel, get_ema_multi_avg_fn
from .groups import param_groups
from .lookahead import Lookahead
from .msam import MSAM
from .registry import *  # noqa: F403
from .regularizers import *  # noqa: F403
from .sam import SAM
from .slow_weights import SlowWeights
from .weight_averages import EMA, SWA
from .weight_noise import WeightNoise

Piece = Component  # an alias for one release

__all__ = [
    "EMA", "MSAM", "SAM", "SWA", "AveragedModel", "Component", "Lookahead", "Phase", "Piece", "SlowWeights",
    "WeightNoise", "get_ema_multi_avg_fn", "param_groups",
]  # fmt: skip
__all__ += registry.__all__
__all__ += regularizers.__all__
