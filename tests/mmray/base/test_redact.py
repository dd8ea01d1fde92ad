"""Passwords and tokens of URIs do not come through; everything else does, letter by letter."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.base.redact import holds_secret, redacted
from mmray.config.job import Job
from mmray.errors import RowError, UserError

SECRETS = {
    "s3://key:hunter2@bucket/a.png": "s3://key:…@bucket/a.png",
    "s3://key:hunt/er2+@bucket/a.png": "s3://key:…@bucket/a.png",
    "webhdfs://:hunter2@host:9870/a": "webhdfs://:…@host:9870/a",
    "see 'ftp://me:hunter2@h/x': no": "see 'ftp://me:…@h/x': no",
    "abfs://c@a.dfs.core.windows.net/x?sv=1&sig=hunter2&se=2": "abfs://c@a.dfs.core.windows.net/x?sv=1&sig=…&se=2",
    "https://b.s3.amazonaws.com/x?X-Amz-Credential=hunter2&X-Amz-Signature=hunter2": (
        "https://b.s3.amazonaws.com/x?X-Amz-Credential=…&X-Amz-Signature=…"
    ),
    "https://h/x?api_key=hunter2": "https://h/x?api_key=…",
    "http://h?ACCESS_TOKEN=hunter2": "http://h?ACCESS_TOKEN=…",
}
HARMLESS = [
    "s3://bucket/a:b@c/d.png",
    "hdfs://name:8020/scans/page@2x.png",
    "hdfs://user@name:8020/scan.png",
    "abfs://container@account.dfs.core.windows.net/x",
    "s3://bucket/x?versionId=3",
    "/data/pages/key=7/a.png",
    "https://h/x?monkey_business=1&page=2",
    "memory://a::file:///b",
    "mail me: a@b.c, see http://x/y",
]


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_left_out_and_the_rest_stays(text: str) -> None:
    assert redacted(text) == SECRETS[text]
    assert holds_secret(text)
    assert not holds_secret(redacted(text))


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


@given(st.text())
def test_once_is_enough(text: str) -> None:
    assert redacted(redacted(text)) == redacted(text)


@pytest.mark.parametrize("text", SECRETS)
def test_errors_hold_no_secret(text: str) -> None:
    errors = UserError(f"{text}: no"), RowError("image_missing", f"{text}: no")
    assert "hunter2" not in "".join(str(error) + repr(error) for error in errors)


def test_a_job_that_names_a_secret_is_refused_without_it() -> None:
    content = {
        "name": "test",
        "model": {"path": "some/model"},
        "data": {"train": [{"files": ["a.jsonl", "s3://key:hunter2@bucket/rows.jsonl"], "kind": "pretrain"}]},
        "packing": {"token_capacity": 8, "visual_capacity": 8},
        "training": {"steps": 1},
        "output": {"prepared": "p", "run": "r"},
    }
    with pytest.raises(
        ValueError, match=r"data\.train\.0\.files\.1 holds a password or a token; leave it out"
    ) as caught:
        Job.model_validate(content)
    assert "hunter2" not in str(caught.value)
