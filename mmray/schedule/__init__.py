"""Computes the order of a run as a pure function of (fingerprint, seed, step), and records a run's place in it."""

from mmray.schedule.balanced import BalancedSchedule
from mmray.schedule.cursor import Cursor
from mmray.schedule.mixture import MixedSchedule, Mixture
from mmray.schedule.schedule import Schedule

__all__ = ["BalancedSchedule", "Cursor", "MixedSchedule", "Mixture", "Schedule"]
