"""Trains with differential privacy: per-sample clipping, Gaussian noise, accounting by other libraries."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .accounting import Accounted, epsilon, noise_multiplier_for
from .bookkeeping import BookKeeping
from .optimizer import DPOptimizer
from .sampling import PoissonSampler, poisson_loader

if TYPE_CHECKING:
    from .opacus import PrivacyEngine

__all__ = [
    "Accounted", "BookKeeping", "DPOptimizer", "PoissonSampler", "PrivacyEngine", "epsilon",
    "noise_multiplier_for", "poisson_loader",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports Opacus when `PrivacyEngine` is first used."""
    if name == "PrivacyEngine":
        return importlib.import_module(".opacus", __name__).PrivacyEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Returns the public names, `PrivacyEngine` among them."""
    return __all__
