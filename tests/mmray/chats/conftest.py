"""Processors of the zoo."""

from tests.mmray.families.conftest import zoo_folder, zoo_processor

__all__ = ["zoo_folder", "zoo_processor"]
