"""Adversarial inputs and embeddings: attacks by the gradient, and training on what they find."""

from .attacks import ffgsm, fgsm, fgsm_attack, pgd
from .fgm import FGM
from .training import adversarial_training

__all__ = ["FGM", "adversarial_training", "ffgsm", "fgsm", "fgsm_attack", "pgd"]
