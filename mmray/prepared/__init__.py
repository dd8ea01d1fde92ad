"""The prepared dataset: its files, how they are written, how they are read."""

from mmray.prepared.dataset import Bin, PreparedDataset
from mmray.prepared.writer import PreparedWriter, WindowWriter

__all__ = ["Bin", "PreparedDataset", "PreparedWriter", "WindowWriter"]
