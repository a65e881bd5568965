"""Modules of regularization, fused: `fastreg.nn.Dropout` in place of `torch.nn.Dropout`."""

from . import functional
from .dropout import Dropout

__all__ = ["Dropout", "functional"]
