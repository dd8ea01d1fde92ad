"""Images: their size from the header, their upright pixels, and the tiles into which a page is cut."""

from mmray.images.header import ImageHeader, image_size, read_header
from mmray.images.load import load_image
from mmray.images.policy import OverviewBucket, ShapeBucket, TilingPolicy
from mmray.images.render import render_tiles
from mmray.images.source import ALLOWED_SCHEMES, ImageSource, open_image
from mmray.images.tiling import TilePlan, cut_tiles, plan_tiles

__all__ = [
    "ALLOWED_SCHEMES",
    "ImageHeader",
    "ImageSource",
    "OverviewBucket",
    "ShapeBucket",
    "TilePlan",
    "TilingPolicy",
    "cut_tiles",
    "image_size",
    "load_image",
    "open_image",
    "plan_tiles",
    "read_header",
    "render_tiles",
]
