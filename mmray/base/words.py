"""Formats numbers, notes and the messages of other libraries' errors."""

from datetime import UTC, datetime, timedelta

from mmray.base.version import __version__


def amount(count: int) -> str:
    """Format a count to read at a glance: 1,959 or 5.62 M."""
    for limit, letter in ((10**12, "T"), (10**9, "G"), (10**6, "M")):
        if count >= limit:
            return f"{count / limit:.3g} {letter}"
    return f"{count:,}"


def counted(count: int, noun: str) -> str:
    """A count with its noun, in the plural where it is not 1: 1 bin, 2,048 bins, 3 batches."""
    ending = "" if count == 1 else "es" if noun.endswith("ch") else "s"
    return f"{count:,} {noun}{ending}"


def file_size(size: int) -> str:
    """Format a number of bytes in decimal units: 0.8 kB, 12.3 MB or 4.56 GB."""
    if size >= 10**8:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 10**5 else f"{size / 1e3:.1f} kB"


def span(time: timedelta) -> str:
    """Format a length of time in its two largest units: 3 d 4 h, 12 min 5 s."""
    seconds = int(time.total_seconds())
    parts = [(seconds // 86_400, "d"), (seconds // 3600 % 24, "h"), (seconds // 60 % 60, "min"), (seconds % 60, "s")]
    first = next((place for place, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count) or "0 s"


def one_line(error: BaseException) -> str:
    """Returns the message of another library's exception as one line of at most 200 characters."""
    text = str((isinstance(error, OSError) and error.strerror) or error)
    return " ".join(text.split())[:200] or type(error).__name__


def made_by() -> str:
    """The last line of a page: version and time."""
    return f"mmray {__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
