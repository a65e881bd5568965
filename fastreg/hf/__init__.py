"""Hugging Face: Trainer, and loops of accelerate."""

from .callbacks import ScheduleCallback
from .trainer import FastregTrainer, FastregTrainerMixin

__all__ = ["FastregTrainer", "FastregTrainerMixin", "ScheduleCallback"]
