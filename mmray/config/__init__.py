"""The job file: its settings, how it is read, and whether its parts fit together."""

from mmray.config.job import Job, load_job

__all__ = ["Job", "load_job"]
