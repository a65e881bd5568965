"""Modules of regularization, fused: `fastreg.nn.Dropout` in place of `torch.nn.Dropout`."""

from . import functional
from .adaptive import AdaptiveDropout
from .drop_path import DropPath, drop_add_residual
from .dropout import Dropout
from .fused import BiasActDropout, BiasActDropoutAdd, BiasDropoutAdd, DropoutAdd
from .replace import replace_dropout
from .spatial import Dropout1d, Dropout2d, Dropout3d
from .transformer import TransformerWithDropout

__all__ = [
    "AdaptiveDropout", "BiasActDropout", "BiasActDropoutAdd", "BiasDropoutAdd", "DropPath", "Dropout",
    "Dropout1d", "Dropout2d", "Dropout3d", "DropoutAdd", "TransformerWithDropout", "drop_add_residual",
    "functional", "replace_dropout",
]  # fmt: skip
