"""A training run's folder: its checkpoints and where it stands, its history, metrics, warnings, and trackers.

Nothing is imported here, so that each part is read alone.
"""
