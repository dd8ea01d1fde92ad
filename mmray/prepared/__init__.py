"""Reads and writes prepared datasets."""

from mmray.prepared.dataset import Bin, PreparedDataset
from mmray.prepared.writer import PreparedWriter, WindowWriter

__all__ = ["Bin", "PreparedDataset", "PreparedWriter", "WindowWriter"]
