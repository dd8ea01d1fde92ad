"""A real S3 server on loopback, and the environment by which every process of the tests finds it."""

import logging
import os
import socket
from collections.abc import Iterator
from itertools import count

import pytest

SECRET = "a-secret-that-stands-nowhere"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


PORT = _free_port()
# Before the Ray of the tests starts, whose workers inherit it.
os.environ |= {
    "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{PORT}",
    "AWS_ACCESS_KEY_ID": "mmray-tests",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}

_fresh_names = count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[None]:
    """The server, running."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=PORT, verbose=False)
    server.start()
    yield
    server.stop()


@pytest.fixture(scope="module")
def bucket(s3_server: None) -> str:
    """`s3://` and the name of an empty bucket."""
    import fsspec

    name = f"bucket-{os.getpid()}-{next(_fresh_names)}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(name)
    return f"s3://{name}"
