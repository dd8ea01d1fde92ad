"""2D packing: samples into bins that hold a token capacity and a visual-token capacity, both at once."""

from mmray.packing.pack import lower_bound, pack_2d

__all__ = ["lower_bound", "pack_2d"]
