"""Trackers, which receive the numbers of a run in addition to its `metrics.jsonl`."""

from mmray.run.tracking.run import TrackedRun, git_commit, public_settings
from mmray.run.tracking.settings import TrackingSettings

__all__ = ["TrackedRun", "TrackingSettings", "git_commit", "public_settings"]
