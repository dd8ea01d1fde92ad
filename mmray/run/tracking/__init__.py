"""Trackers: where else the numbers of a run go, besides its `metrics.jsonl`."""

from mmray.run.tracking.run import TrackedRun, git_commit, public_settings
from mmray.run.tracking.settings import TrackingSettings

__all__ = ["TrackedRun", "TrackingSettings", "git_commit", "public_settings"]
