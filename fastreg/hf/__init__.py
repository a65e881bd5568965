"""Hugging Face: Trainer, and loops of accelerate."""

from .callbacks import EmbeddingNoiseCallback, ScheduleCallback
from .trainer import FastregTrainer, FastregTrainerMixin

__all__ = ["EmbeddingNoiseCallback", "FastregTrainer", "FastregTrainerMixin", "ScheduleCallback"]
