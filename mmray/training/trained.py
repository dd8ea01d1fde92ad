"""The log of trained bins under its public name; it lives in `mmray.training.bins_log`."""

from mmray.training.bins_log import TrainedStep, read_trained

__all__ = ["TrainedStep", "read_trained"]
