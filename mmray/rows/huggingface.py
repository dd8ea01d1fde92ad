"""Reads datasets of Hugging Face as rows, in two ways:

- A folder that `Dataset.save_to_disk` wrote is a row source as it is (`format: huggingface`): its rows are read by
  ranges, images as the bytes they are stored as, never decoded.
- Anything else that `datasets.load_dataset` knows (a name on the hub, an image folder, JSON, also what would not fit
  on a disk) is a stream, which can be read only from its beginning. `write_rows` writes it once into Parquet files,
  which are then rows like any others. It always streams, so nothing is kept in a cache of `datasets`.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmray.base.words import one_line
from mmray.errors import UserError
from mmray.rows.tables import used_columns
from mmray.storage import Folder

ROWS_PER_FILE = 8192
_ROWS_PER_GROUP = 64
_SOURCE = "source.json"
_STATE = "state.json"
_SPLITS = "dataset_dict.json"


class SavedRows:
    """The rows of a folder that `Dataset.save_to_disk` wrote."""

    def __init__(self, folder: str, columns: Sequence[str] = ()) -> None:
        """Opens the folder. columns: the columns that are used; () for all.

        Raises UserError where the folder is not one of `Dataset.save_to_disk`.
        """
        self.folder = folder
        dataset = _saved(folder)
        names = used_columns(dataset.column_names, columns) if columns else None
        self._dataset = (dataset if names is None else dataset.select_columns(names)).with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def batches(self, start: int, stop: int) -> Iterator[pa.Table]:
        """Yields rows [start, stop), some at a time."""
        for first in range(start, stop, _ROWS_PER_GROUP):
            yield self._dataset[first : min(first + _ROWS_PER_GROUP, stop)]


def saved_version(folder: str) -> str:
    """Returns the version of a saved dataset, from its fingerprint and the state of its files."""
    state = json.loads((Path(folder) / _STATE).read_text())
    statuses = [(Path(folder) / data_file["filename"]).stat() for data_file in state["_data_files"]]
    files = repr([(status.st_size, status.st_mtime_ns) for status in statuses])
    return f"{state['_fingerprint']}-{hashlib.blake2b(files.encode(), digest_size=8).hexdigest()}"


def write_rows(target: str, rows_per_file: int = ROWS_PER_FILE, **source: str | None) -> int:
    """Writes a dataset into the Parquet files `rows-00000.parquet`, … of a folder; returns its number of rows.

    The same source gives the same files. A second run continues behind the last whole file, and returns at once for a
    finished dataset.
    source: `path`, `name`, `split`, `revision`, `data_dir`, `data_files`, as for `datasets.load_dataset`.

    Raises UserError for a source that cannot be loaded, and where the folder holds the rows of another source.
    """
    folder, source_options = Folder(target), {key: value for key, value in source.items() if value is not None}
    record: dict[str, Any] = {"source": source_options, "rows_per_file": rows_per_file}
    stored_record: dict[str, Any] = json.loads(folder.read(_SOURCE)) if folder.exists(_SOURCE) else record
    if {key: stored_record.get(key) for key in record} != record:
        raise UserError(f"{target} holds rows of another source, {stored_record.get('source')}; choose another folder")
    if "rows" in stored_record:
        return int(stored_record["rows"])
    folder.create()
    folder.write(_SOURCE, _json(record))
    stream = _stream(source_options)
    files = sum(name.startswith("rows-") for name in folder.names())
    total = files * rows_per_file
    for table in _tables(stream.skip(total), rows_per_file):
        with folder.writing(f"rows-{files:05d}.parquet") as file:
            pq.write_table(table, file, row_group_size=_ROWS_PER_GROUP)
        files, total = files + 1, total + table.num_rows
    folder.write(_SOURCE, _json(record | {"rows": total}))
    return total


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("datasets of Hugging Face need a package: pip install 'mmray[huggingface]'") from error
    return datasets


def _saved(folder: str) -> Any:
    if "://" in folder:
        raise UserError(f"{folder}: a saved dataset is read in place, from a folder that all nodes share, not by URI")
    if (Path(folder) / _SPLITS).is_file():
        splits = json.loads((Path(folder) / _SPLITS).read_text())["splits"]
        raise UserError(f"{folder} holds the splits {', '.join(splits)}; name one: {folder.rstrip('/')}/{splits[0]}")
    if not (Path(folder) / _STATE).is_file():
        raise UserError(
            f"{folder} is no folder of Dataset.save_to_disk: it has no {_STATE}. `mmray from-huggingface` makes rows "
            "of other datasets"
        )
    try:
        return _library().load_from_disk(folder)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{folder}: {one_line(error)}; save the dataset anew") from error


def _stream(source: dict[str, str]) -> Any:
    """Opens a dataset as a stream whose images are not decoded."""
    datasets = _library()
    options = dict(source)
    path = options.pop("path")
    try:
        stream = datasets.load_dataset(path, **options, streaming=True)
    except Exception as error:  # a builder of someone else's may raise anything
        raise UserError(f"{path}: {one_line(error)}") from error
    if isinstance(stream, dict):
        raise UserError(f"{path} has the splits {', '.join(stream)}; name one with --split")
    return stream.cast(_undecoded(stream.features, datasets)) if stream.features else stream


def _undecoded(feature: Any, datasets: Any) -> Any:
    """Returns features in which images are bytes instead of decoded images."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return type(feature)({name: _undecoded(entry, datasets) for name, entry in feature.items()})
    if isinstance(feature, datasets.List):
        return datasets.List(_undecoded(feature.feature, datasets), length=feature.length)
    return feature


def _tables(stream: Any, rows: int) -> Iterator[pa.Table]:
    """Yields the rows of a stream with the bytes of their images, in tables of `rows` rows."""
    from datasets.table import embed_table_storage

    for table in stream.with_format("arrow").iter(batch_size=rows):
        if stream.features:
            table = embed_table_storage(table.cast(stream.features.arrow_schema))
        yield table.replace_schema_metadata(None)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
