"""The order of a run as a pure function of (fingerprint, seed, step), and the cursor that says where a run stands."""

from mmray.schedule.balanced import BalancedSchedule
from mmray.schedule.cursor import Cursor
from mmray.schedule.schedule import Schedule

__all__ = ["BalancedSchedule", "Cursor", "Schedule"]
