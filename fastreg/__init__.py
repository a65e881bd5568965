"""Regularization for PyTorch, fused into Triton kernels."""

import importlib
from typing import Any

from . import adversarial, layerwise, loops, losses, nn, optim, privacy, schedules
from .adversarial import FGM, fgsm, pgd
from .common.batch_norm import frozen_running_stats, update_bn
from .losses import l1_penalty, l2_penalty, r_drop, r_drop_loss
from .nn import NoiseScheduler
from .optim import *  # noqa: F403
from .privacy import DPOptimizer
from .recipe import Regularization
from .runtime.backend import use_backend
from .runtime.environment import info

__version__ = "0.1.0"

__all__ = [
    "FGM", "DPOptimizer", "NoiseScheduler", "Regularization", "adversarial", "fgsm", "frozen_running_stats",
    "info", "l1_penalty", "l2_penalty", "layerwise", "loops", "losses", "nn", "optim", "pgd", "privacy",
    "r_drop", "r_drop_loss", "schedules", "update_bn", "use_backend",
]  # fmt: skip
__all__ += optim.__all__


def __getattr__(name: str) -> Any:
    """Imports `fastreg.hf`, and transformers with it, when it is first used."""
    if name == "hf":
        return importlib.import_module(".hf", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
