"""A training run's folder: its checkpoints, place, history, metrics, warnings and trackers.

This module imports nothing, so that each part can be imported alone.
"""
