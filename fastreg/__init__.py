"""Regularization for PyTorch, fused into Triton kernels."""

from .backend import use_backend
from .optim import EMA, L1, L2SP, SGD, Adam, AdamW, ClipNorm, ClipValue, GradientNoise, Lion, Phase, Piece

__version__ = "0.1.0"

__all__ = [
    "EMA", "L1", "L2SP", "SGD", "Adam", "AdamW", "ClipNorm", "ClipValue", "GradientNoise", "Lion", "Phase",
    "Piece", "use_backend",
]  # fmt: skip
