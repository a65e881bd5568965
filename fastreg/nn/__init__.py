"""Modules of regularization, fused: `fastreg.nn.Dropout` in place of `torch.nn.Dropout`, and noise."""

from . import functional
from .adaptive import AdaptiveDropout
from .attached import attach_activation_noise
from .drop_path import DropPath, drop_add_residual
from .dropout import Dropout
from .embedding_noise import EmbeddingNoise, attach_embedding_noise
from .fused import BiasActDropout, BiasActDropoutAdd, BiasDropoutAdd, DropoutAdd
from .noise import ActivationNoise, InputNoise, TokenNoise
from .noise_scheduler import NoiseScheduler
from .replace import replace_dropout
from .spatial import Dropout1d, Dropout2d, Dropout3d
from .token_noise import attach_token_noise
from .transformer import TransformerWithDropout

__all__ = [
    "ActivationNoise", "AdaptiveDropout", "BiasActDropout", "BiasActDropoutAdd", "BiasDropoutAdd", "DropPath",
    "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "DropoutAdd", "EmbeddingNoise", "InputNoise",
    "NoiseScheduler", "TokenNoise", "TransformerWithDropout", "attach_activation_noise",
    "attach_embedding_noise", "attach_token_noise", "drop_add_residual", "functional", "replace_dropout",
]  # fmt: skip
