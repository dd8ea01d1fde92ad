"""Holds the version of mmray."""

__version__ = "0.2.0"
