"""Regularization for PyTorch, fused into Triton kernels."""

from .backend import use_backend
from .optim import EMA, SGD, AdamW, ClipNorm, GradientNoise, Lion, Phase, Piece

__version__ = "0.1.0"

__all__ = ["EMA", "SGD", "AdamW", "ClipNorm", "GradientNoise", "Lion", "Phase", "Piece", "use_backend"]
