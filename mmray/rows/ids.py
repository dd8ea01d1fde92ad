"""Ids of rows as text: strings and numbers, and what tables hold besides them."""

import datetime
import decimal
import uuid


def has_id(value: object) -> bool:
    """Whether a field holds anything: pandas writes NaN where a row has no number."""
    return value is not None and value == value


def id_text(value: object) -> str | None:
    """An id as text, None for what is none. Numbers are written as Python writes them (7, 7.0), times as ISO 8601,
    bytes as the text that they are, else as hexadecimal digits, as of a UUID."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str | int | float | decimal.Decimal | uuid.UUID):
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
