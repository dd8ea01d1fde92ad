"""Opening images: every kind of source, and the error of everything that is none."""

import io
import os
from pathlib import Path
from typing import BinaryIO

import fsspec
import pytest

from mmray.errors import RowError, UserError
from mmray.images import ALLOWED_SCHEMES, open_image, source


def read(opened: BinaryIO) -> bytes:
    with opened as file:
        return file.read()


def row_error(image: object) -> RowError:
    with pytest.raises(RowError) as caught:
        open_image(image)  # type: ignore[arg-type]
    assert "\n" not in caught.value.message
    return caught.value


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.bin"
    path.write_bytes(b"pixels")
    return path


def test_a_path_as_text_and_as_an_object(page: Path) -> None:
    assert read(open_image(str(page))) == b"pixels"
    assert read(open_image(page)) == b"pixels"


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes(kind: type) -> None:
    assert read(open_image(kind(b"pixels"))) == b"pixels"


def test_a_uri_is_opened_by_fsspec() -> None:
    with fsspec.open("memory://mmray-test/a page.bin", "wb") as file:
        file.write(b"pixels")
    assert read(open_image("memory://mmray-test/a page.bin")) == b"pixels"


def test_a_file_object_stays_its_owners() -> None:
    file = io.BytesIO(b"pixels")
    assert open_image(file) is file
    with source.image_file(file):
        pass
    assert not file.closed


def test_what_mmray_opens_mmray_closes(page: Path) -> None:
    with source.image_file(page) as file:
        assert not file.closed
    assert file.closed


@pytest.mark.parametrize("name", ["none.jpg", "page.bin/inside.jpg"])
def test_missing_file(page: Path, name: str) -> None:
    error = row_error(str(page.parent / name))
    assert error.reason == "image_missing"
    assert name in error.message


def test_missing_object() -> None:
    assert row_error("memory://mmray-test/none.jpg").reason == "image_missing"


@pytest.mark.parametrize("name", ["a\nb.jpg", "x" * 200 + "\n" + "y" * 200])
def test_messages_are_one_short_line(name: str) -> None:
    assert len(row_error(name).message) < 300


def test_a_folder_is_unreadable(tmp_path: Path) -> None:
    error = row_error(tmp_path)
    assert error.reason == "image_unreadable"
    assert "folder" in error.message


def test_a_name_the_system_refuses_is_unreadable() -> None:
    assert row_error("a\0b.jpg").reason == "image_unreadable"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read everything")
def test_permission_of_the_real_file_system(page: Path) -> None:
    page.chmod(0)
    assert row_error(page).reason == "image_unreadable"


def test_permission(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> BinaryIO:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(source, "open", denied, raising=False)
    error = row_error(page)
    assert error.reason == "image_unreadable"
    assert "permission" in error.message


@pytest.mark.parametrize("failure", [ConnectionResetError("reset"), TimeoutError("slow"), MemoryError()])
def test_failures_that_say_nothing_of_the_row_pass(failure: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> BinaryIO:
        raise failure

    monkeypatch.setattr(source, "open", fails, raising=False)
    with pytest.raises(type(failure)) as caught:
        open_image("page.jpg")
    assert caught.value is failure


@pytest.mark.parametrize(
    "uri",
    [
        "http://host/a.jpg",
        "https://host/a.jpg",
        "file:///etc/hostname",
        "ftp://host/a.jpg",
        "://a.jpg",
        "simplecache::memory://a.jpg",
        "memory://a::file:///etc/hostname",
    ],
)
def test_schemes_outside_the_list(uri: str) -> None:
    error = row_error(uri)
    assert error.reason == "image_scheme"
    assert uri in error.message


def test_schemes_of_the_list_are_known_to_fsspec() -> None:
    assert {*fsspec.available_protocols(), "abfss"} >= ALLOWED_SCHEMES, "abfss comes with adlfs"
    assert not ALLOWED_SCHEMES & {"http", "https", "file", "local"}


def test_a_scheme_in_capitals_is_the_same_scheme() -> None:
    assert row_error("HTTP://host/a.jpg").reason == "image_scheme"
    assert row_error("MEMORY://mmray-test/none.jpg").reason == "image_missing"


def test_a_file_system_that_is_not_set_up_is_the_jobs_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(uri: str, **_) -> object:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", not_installed)
    with pytest.raises(UserError, match="Install s3fs"):
        open_image("s3://bucket/a.jpg")


def test_something_else_is_a_mistake_in_the_calling_code() -> None:
    with pytest.raises(TypeError, match="int"):
        open_image(7)  # type: ignore[arg-type]
