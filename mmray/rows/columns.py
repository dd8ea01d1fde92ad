"""Finds columns that a job names and no row has, and columns of images that the job does not name.

A row without images is a good row, so a misspelt column of images would train on text without its images. One row does
not show that, but a whole data set does. A data set is checked twice: on its first rows, before work starts, and on all
rows, before a prepared dataset is finished.
"""

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from mmray.rows.settings import LIKE_IMAGES, DatasetSettings


def watched_columns(value: object, dataset: DatasetSettings) -> tuple[str, ...]:
    """Returns the columns of a row that are checked: those that the data set names, and those that look like images."""
    if not isinstance(value, dict):
        return ()
    candidates = _candidates(tuple(value), tuple(dataset.columns.values()))
    return tuple(name for name, is_named in candidates if is_named or value[name])


@lru_cache(maxsize=1024)
def _candidates(columns: tuple[str, ...], named: tuple[str, ...]) -> tuple[tuple[str, bool], ...]:
    """Returns the columns that a data set names or that look like images, and whether it names them."""
    return tuple(
        (name, name in named) for name in columns
        if name in named or (isinstance(name, str) and name.lower() in LIKE_IMAGES)
    )  # fmt: skip


def columns_problem(name: str, dataset: Mapping[str, Any], images: int, present_columns: Collection[str]) -> str | None:
    """Describes what is wrong with a data set's columns, in one line; returns None where nothing is.

    name: the name of the data set, such as `data.train[0]`.
    dataset: its settings as plain JSON.
    images: the number of images of the rows that were examined.
    present_columns: the watched columns that any of these rows has.
    """
    missing = [f"{field}: {column}" for field, column in dataset["columns"].items() if column not in present_columns]
    if missing:
        return f"{name}.columns has {missing[0]!r}, and no row has that column; mend the name or leave it out"
    image_column = dataset["columns"].get("images", "images")
    others = sorted(column for column in present_columns if column != image_column and column.lower() in LIKE_IMAGES)
    if not images and others:
        return (
            f"{name}: no row has an image, and rows have the column {others[0]!r}; name it, columns: {{images: "
            f"{others[0]}}}, or take it out of the rows"
        )
    return None
