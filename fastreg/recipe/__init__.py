"""One declarative object that combines everything: `Regularization`, and the callbacks that it makes."""

from .callbacks import Callback, Callbacks
from .regularization import Regularization

__all__ = ["Callback", "Callbacks", "Regularization"]
