"""Passwords and tokens that stand in URIs, kept out of what mmray shows and writes.

`s3://user:password@host/x` and `…?sig=token` are refused where a job or a row names them; credentials belong into the
environment or the store's own files. The message of every error goes through here all the same.
"""

import re

_PASSWORD = re.compile(r"(://[^/\s:@'\"]*):(?!\d+/)[^\s@'\"]+@")
"""A password before a host; a port and an @ further on, as in `hdfs://name:8020/scan@2x.png`, are none."""

_TOKEN = re.compile(
    r"([?&][\w.-]*(?:token|signature|sig|secret|passw(?:or)?d|pwd|credentials?|key|keyid)=)[^&\s'\"#]+", re.IGNORECASE
)
"""A value of a query whose name ends like that of a secret: of presigned URLs, Azure's SAS, API keys."""


def redacted(text: str) -> str:
    """The text with `…` for each password and token in a URI."""
    return _TOKEN.sub(r"\1…", _PASSWORD.sub(r"\1:…@", text))


def holds_secret(text: str) -> bool:
    """Whether a URI in the text holds a password or a token."""
    return redacted(text) != text
