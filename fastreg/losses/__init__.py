"""Losses to add to a task's own: penalties on the weights, and R-Drop."""

from .penalties import Parameters, l1_penalty, l2_penalty
from .r_drop import RDrop, r_drop, r_drop_loss

__all__ = ["Parameters", "RDrop", "l1_penalty", "l2_penalty", "r_drop", "r_drop_loss"]
