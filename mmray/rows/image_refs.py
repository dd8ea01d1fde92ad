"""Reads the images that a row names: a path inside the image root, a URI of an allowed scheme, or bytes.

Rows come from people. A local path must stay inside the image root after `..` and symbolic links are resolved, so that
a link to `/etc` does not lead out. The one exception is how the hub's cache stores a repository: links in `snapshots`
to the `blobs` of the same repository. Folders of images are resolved once and remembered, so that a row costs 7 µs for
each image's name.
"""

import contextlib
import functools
import json
import os
import posixpath
import re
from dataclasses import dataclass
from typing import Any

from mmray.base.redact import holds_secret
from mmray.errors import RowError
from mmray.images.paged import file_of
from mmray.images.source import base64_bytes, embedded_picture
from mmray.images.tar_member import PartOfFile
from mmray.rows.settings import ONE_IMAGE, DatasetSettings

_SNAPSHOT = re.compile(r"(?P<repository>.*/(datasets|models|spaces)--[^/]+)/snapshots/[^/]+/.+", re.DOTALL)


@dataclass(frozen=True)
class ImageRef:
    """One image of a row: its path or URI, or its bytes."""

    uri: str = ""
    data: bytes | None = None


def image_refs(value: dict[str, Any], source: str, dataset: DatasetSettings) -> tuple[ImageRef, ...]:
    """Returns the row's images: paths are joined to the image root, bytes are kept.

    source: the place of the row, `file:line`.

    Raises RowError: `wrong_type`, `image_outside_root`, `image_credentials`.
    """
    entries = _entries(value, dataset)
    if not entries:
        return ()
    root = image_folder(source, dataset)
    return tuple(entry if isinstance(entry, ImageRef) else image_ref(entry, root) for entry in entries)


def remote_images(value: dict[str, Any], source: str, dataset: DatasetSettings) -> list[str]:
    """Returns the URIs among the row's images, as `image_refs` gives them; none for a row that it refuses."""
    try:
        entries = _entries(value, dataset)
        if not entries:
            return []
        if "://" not in image_folder(source, dataset) and not any("://" in _place(entry) for entry in entries):
            return []
        return [ref.uri for ref in image_refs(value, source, dataset) if "://" in ref.uri]
    except RowError:
        return []


def _entries(value: dict[str, Any], dataset: DatasetSettings) -> list[Any]:
    """Returns the images of a row as the row writes them."""
    column = dataset.column("images")
    images = value.get(column)
    if "images" not in dataset.columns and (image := value.get(ONE_IMAGE)):
        if not images:
            column, images = ONE_IMAGE, image
        elif image != images and not (isinstance(images, list) and image in images):
            raise RowError(
                "image_conflict",
                f"the row has both images and {ONE_IMAGE}, which name different pictures; leave one of them out, or "
                "name the one to read: columns: {images: images}",
            )
    if images is None or images == "":
        return []
    if isinstance(images, list):
        return images
    if isinstance(images, str):
        return _listed(images)
    if isinstance(images, dict | bytes):  # a column of single images
        return [images]
    raise RowError("wrong_type", f"{column} must be a list of images, not {type(images).__name__} {images!r:.60}")


def _place(entry: object) -> str:
    if isinstance(entry, ImageRef):
        return entry.uri
    place = entry.get("path") if isinstance(entry, dict) else entry
    return place if isinstance(place, str) else ""


def _listed(text: str) -> list[Any]:
    """Returns the images in a text: one, or several in a JSON list, as in a cell of CSV."""
    with contextlib.suppress(ValueError):
        entries = json.loads(text) if text.startswith("[") else None
        if isinstance(entries, list):
            return entries
    return [text]


def image_folder(source: str, dataset: DatasetSettings) -> str:
    """Returns the folder to which the image paths of a row are relative. source: the place of the row, `file:line`."""
    return dataset.image_root or _folder(source.rsplit(":", 1)[0])


def image_ref(entry: object, root: str) -> ImageRef:
    """Reads one image as a row names it, in its column or in a part of a message. Raises RowError as `image_refs`."""
    if isinstance(entry, dict):  # the form of Hugging Face datasets: bytes, path or both
        if entry and not entry.keys() & {"bytes", "path"}:
            keys = ", ".join(map(repr, entry))  # on one line, whatever they hold
            raise RowError("wrong_type", f"an image as an object has bytes or a path; this one has {keys:.60}")
        data = entry.get("bytes")
        entry = (base64_bytes(data) if isinstance(data, str) else data) or entry.get("path")
    if isinstance(entry, bytes):
        return ImageRef(data=entry)
    if not isinstance(entry, str) or not entry:
        raise RowError("wrong_type", f"an image must be a path, a URI or bytes, not {entry!r:.60}")
    if (data := embedded_picture(entry)) is not None:
        return ImageRef(data=data)
    uri = entry if "://" in entry else _inside(root, entry)
    if "://" in uri and holds_secret(entry):  # a local name may hold any sign
        raise RowError(
            "image_credentials",
            f"image {entry!r:.200} holds a password or a token; give credentials by the environment of the cluster",
        )
    return ImageRef(uri=uri)


def _inside(root: str, path: str) -> str:
    """Joins an image path to the image root. Raises RowError `image_outside_root` where it leads out of the root."""
    scheme, mark, folder = root.rpartition("://")
    folder = posixpath.normpath(folder) if folder else ""
    joined = posixpath.normpath(posixpath.join(folder, path))
    if not (_leads_inside(folder, joined) if not mark else _is_below(folder.rstrip("/"), joined, path)):
        raise RowError(
            "image_outside_root",
            f"image {path!r:.200} lies outside image_root {root!r}; move it inside, or set image_root to a folder "
            "that holds all images",
        )
    return f"{scheme}{mark}{joined}"


def _is_below(top: str, joined: str, path: str) -> bool:
    """Tells whether a path in object storage, which has no links, lies below `top`."""
    if posixpath.isabs(path):
        return joined.startswith(f"{top}/")
    return not f"{posixpath.normpath(path)}/".startswith("../")


def _leads_inside(folder: str, joined: str) -> bool:
    """Tells whether a local path lies in the folder once all links are followed. Neither needs to exist."""
    file = file_of(joined)
    part = PartOfFile.written(file)
    place = os.path.abspath(part.file if part else file)
    with contextlib.suppress(ValueError):  # a name that no file system takes; opening it says so
        place = os.path.join(_resolved(os.path.dirname(place)), os.path.basename(place))
        if os.path.islink(place):
            target = os.path.realpath(place)
            place = place if _is_blob_of_snapshot(place, target) else target
    return f"{place}/".startswith(f"{_resolved(folder).rstrip('/')}/")


def _is_blob_of_snapshot(place: str, target: str) -> bool:
    """Tells whether a link in a hub cache, in a repository's `snapshots/COMMIT`, ends at a file directly inside the
    `blobs` of the same repository. Both paths contain no links except the last part of `place`."""
    match = _SNAPSHOT.fullmatch(place)
    return match is not None and os.path.dirname(target) == f"{match['repository']}/blobs"


@functools.lru_cache(maxsize=65_536)
def _resolved(folder: str) -> str:
    return os.path.realpath(folder)


def _folder(uri: str) -> str:
    """Returns the folder of a file, by path or URI."""
    scheme, mark, path = uri.rpartition("://")
    return f"{scheme}{mark}{posixpath.dirname(path)}"
