"""Holds the version of mmray."""

__version__ = "0.1.0"
