"""Retries reads that fail for transient storage reasons: too many requests, a network or a mount that is gone briefly.

Such an error says nothing about an image. The read is retried three times within half a minute. If the image still
cannot be read, its sample is not skipped; the run stops instead and continues from its last checkpoint when the storage
is back.
"""

import errno
import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from mmray.base.words import one_line
from mmray.errors import PassingError
from mmray.images.source import ImageSource, describe_source

log = logging.getLogger("mmray")

PAUSES = (1.0, 5.0, 25.0)
"""Seconds to wait before each retry."""

_TYPES = (ConnectionError, TimeoutError)
_NUMBERS = {
    errno.EAGAIN, errno.EBUSY, errno.EMFILE, errno.ENFILE, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESTALE,
}  # fmt: skip
"""Transient errors of operating systems, NFS and FUSE mounts. `EIO` is left out: on a local disk it is a bad sector."""
_NAMES = {
    "ConnectionError", "HTTPClientError", "ClientConnectionError", "ClientPayloadError", "ServiceRequestError",
    "ServiceResponseError", "ServiceUnavailable", "TooManyRequests",
}  # fmt: skip
"""Transient exceptions of botocore, aiohttp, requests, azure and google, by name, so that none of them is imported."""

Result = TypeVar("Result")


def is_transient(error: BaseException, source: ImageSource) -> bool:
    """Tells whether an error, or one that it was raised from, comes from storage that may be back in a moment."""
    remote = isinstance(source, str) and "://" in source
    return any(_passes(cause) or (remote and _number(cause) == errno.EIO) for cause in _causes(error))


def with_retries(read: Callable[[], Result], source: ImageSource) -> Result:
    """Calls `read`, and retries it after transient errors. source: the image that is read, for messages.

    Raises what `read` raises; after the last try, PassingError for a transient error.
    """
    for pause in PAUSES:
        try:
            return read()
        except Exception as error:
            if not is_transient(error, source):
                raise
            log.warning("%s: %s; tried again in %g s", describe_source(source), one_line(error), pause)
            time.sleep(pause)
    try:
        return read()
    except Exception as error:
        if not is_transient(error, source):
            raise
        raise PassingError(
            f"{describe_source(source)}: {one_line(error)}, also after {len(PAUSES)} more tries within "
            f"{sum(PAUSES):g} s; the picture may be sound, so nothing is left out: see to the storage and start again"
        ) from error


def _passes(error: BaseException) -> bool:
    return (
        isinstance(error, _TYPES)
        or _number(error) in _NUMBERS
        or any(kind.__name__ in _NAMES for kind in type(error).__mro__)
    )


def _number(error: BaseException) -> int | None:
    return error.errno if isinstance(error, OSError) else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
