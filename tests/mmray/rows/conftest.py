"""Small images to name in rows."""

from pathlib import Path

import pytest

from tests.mmray.preparing import write_pictures


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images of `preparing.PICTURES`."""
    return write_pictures(tmp_path_factory.mktemp("pictures"))
