"""The cursor under its public name; it lives in `mmray.schedule.cursor`."""

from mmray.schedule.cursor import Cursor, DataSpan

__all__ = ["Cursor", "DataSpan"]
