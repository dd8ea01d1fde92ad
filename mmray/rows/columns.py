"""Columns that a job names and no row has, and columns of images that nobody named.

A row without images is a good row, so a misspelt column of images would train text without its pictures. One row tells
nothing; a whole set does. It is judged twice: on its first rows, before work starts, and on all, before a dataset is
finished.
"""

from collections.abc import Collection, Mapping
from typing import Any

from mmray.rows.settings import LIKE_IMAGES, DatasetSettings


def watched_columns(value: object, dataset: DatasetSettings) -> tuple[str, ...]:
    """The columns of a row that are judged: those that the set names, and those that look like images."""
    if not isinstance(value, dict):
        return ()
    named = dataset.columns.values()
    return tuple(
        name for name in value
        if name in named or (isinstance(name, str) and name.lower() in LIKE_IMAGES and value[name])
    )  # fmt: skip


def columns_problem(name: str, dataset: Mapping[str, Any], images: int, present_columns: Collection[str]) -> str | None:
    """What is wrong with a set's columns, in one line; None for a good set.

    name: of the set, as `data.train[0]`; dataset: its settings as plain JSON; images: of all its rows that were looked
    at; seen: the watched columns that any of them has.
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
