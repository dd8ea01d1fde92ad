"""Converts ids of rows to text: strings, numbers and the other types that tables hold."""

import datetime
import decimal
import uuid


def has_id(value: object) -> bool:
    """Tells whether a field holds an id: pandas writes NaN where a row has no number."""
    if isinstance(value, str):
        return True
    if isinstance(value, decimal.Decimal):
        return not value.is_nan()  # comparing a signalling NaN raises
    return value is not None and value == value


def id_text(value: object) -> str | None:
    """Converts an id to text; returns None for a value that is no id.

    Numbers are written as Python writes them (7, 7.0), times as ISO 8601, bytes as text where they are printable text,
    else as hexadecimal digits, such as those of a UUID.
    """
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float | decimal.Decimal | uuid.UUID):
        return str(value)
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return str(value)
    if isinstance(value, bytes):
        return _bytes_text(value)
    return None


def _bytes_text(value: bytes) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return value.hex()
    return text if text.isprintable() else value.hex()
