"""Remote storage that counts."""

import fsspec
import pytest

from mmray.images import source
from tests.mmray.images.counted import CountedFileSystem


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> CountedFileSystem:
    """The file system of `counted://` URIs, empty."""
    fsspec.register_implementation("counted", CountedFileSystem, clobber=True)
    monkeypatch.setattr(source, "ALLOWED_SCHEMES", {*source.ALLOWED_SCHEMES, "counted"})
    CountedFileSystem.clear_instance_cache()
    CountedFileSystem.contents, CountedFileSystem.etags = {}, {}
    CountedFileSystem.ranges, CountedFileSystem.num_stats = [], 0
    return fsspec.filesystem("counted")
