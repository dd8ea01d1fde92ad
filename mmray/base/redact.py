"""Removes passwords and tokens in URIs from what mmray shows and writes.

`s3://user:password@host/x` and `…?sig=token` are refused in jobs and rows; credentials belong in the environment or in
the store's configuration files. The message of every error is redacted all the same.
"""

import re

_PASSWORD = re.compile(r"(://[^/\s:@'\"]*):(?!\d+/)[^\s@'\"]+@")
"""Matches a password before a host; not a port with a later @, as in `hdfs://name:8020/scan@2x.png`."""

_TOKEN = re.compile(
    r"([?&][\w.-]*(?:token|signature|sig|secret|passw(?:or)?d|pwd|credentials?|key|keyid)=)[^&\s'\"#]+", re.IGNORECASE
)
"""Matches a query value whose name ends like that of a secret: presigned URLs, Azure's SAS, API keys."""


def redacted(text: str) -> str:
    """Replace each password and token in URIs of a text by `…`."""
    return _TOKEN.sub(r"\1…", _PASSWORD.sub(r"\1:…@", text))


def holds_secret(text: str) -> bool:
    """True when a URI in the text holds a password or a token."""
    return redacted(text) != text
