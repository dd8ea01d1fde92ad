"""Reading that waits out what passes: a store with too many requests, a network or a mount that is gone for a moment.

Such an error says nothing about an image. It is tried again three times within half a minute; a picture that still
cannot be read then is no reason to leave its sample out, but to stop: training continues from its last checkpoint when
the storage is back.
"""

import errno
import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from mmray.errors import PassingError
from mmray.images.source import ImageSource, describe_source, one_line

log = logging.getLogger("mmray")

PAUSES = (1.0, 5.0, 25.0)
"""Seconds before each new try."""

_TYPES = (ConnectionError, TimeoutError)
_NUMBERS = {
    errno.EAGAIN, errno.EBUSY, errno.EMFILE, errno.ENFILE, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESTALE,
}  # fmt: skip
"""Of operating systems, NFS and FUSE mounts. `EIO` is not among them: on a local disk it is a bad sector."""
_NAMES = {
    "ConnectionError", "HTTPClientError", "ClientConnectionError", "ClientPayloadError", "ServiceRequestError",
    "ServiceResponseError", "ServiceUnavailable", "TooManyRequests",
}  # fmt: skip
"""Exceptions of botocore, aiohttp, requests, azure and google, which are not imported for this."""

Result = TypeVar("Result")


def is_transient(error: BaseException, source: ImageSource) -> bool:
    """Whether an error, or one that it was raised from, is of storage that may be back in a moment."""
    remote = isinstance(source, str) and "://" in source
    return any(_passes(cause) or (remote and _number(cause) == errno.EIO) for cause in _causes(error))


def with_retries(read: Callable[[], Result], source: ImageSource) -> Result:
    """What `read` gives of `source`, tried again where the error is a passing one.

    Raises what it raises; after the last try of a passing error PassingError.
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
