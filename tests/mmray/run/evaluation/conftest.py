"""The small processors of the zoo."""

from tests.mmray.families.conftest import zoo_folder  # noqa: F401  a fixture
