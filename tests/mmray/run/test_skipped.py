"""The record of skipped samples: as finally done, and the point at which a run stops."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.batches.render import SkippedSample, skipped_from_array, skipped_to_array
from mmray.errors import UserError
from mmray.run import skipped
from mmray.run.skipped import ALWAYS_ALLOWED, SKIPPED_FILE, WINDOW, BatchCounts, SkipLimit, SkippedLog


def sample(number):
    return SkippedSample(f"row-{number}", f"rows.jsonl:{number}", "image_missing", f"page-{number}.jpg: no such file")


def lines(run):
    return [json.loads(line) for line in (run / SKIPPED_FILE).read_text().splitlines()]


def test_nothing_skipped_leaves_no_file(tmp_path):
    SkippedLog(tmp_path, 0, 0.01).add(1, "train", BatchCounts(100, []))
    assert not (tmp_path / SKIPPED_FILE).exists()


def test_each_skipped_sample_is_a_line_and_a_warning(tmp_path, caplog):
    log = SkippedLog(tmp_path, 0, 0.01)
    log.add(3, "train", BatchCounts(8, [sample(1), sample(2)]))
    log.add(4, "eval", BatchCounts(8, [sample(3)]))
    assert [(each["step"], each["split"], each["id"]) for each in lines(tmp_path)] == [
        (3, "train", "row-1"), (3, "train", "row-2"), (4, "eval", "row-3"),
    ]  # fmt: skip
    assert lines(tmp_path)[0] == {
        "step": 3, "split": "train", "id": "row-1", "source": "rows.jsonl:1", "reason": "image_missing",
        "message": "page-1.jpg: no such file",
    }  # fmt: skip
    assert caplog.messages[0] == (
        "left out of the loss: row 'row-1' (rows.jsonl:1): image_missing: page-1.jpg: no such file"
    )


def test_steps_that_are_done_again_are_listed_once(tmp_path):
    log = SkippedLog(tmp_path, 0, 0.01)
    for step in (1, 2, 3):
        log.add(step, "train", BatchCounts(8, [sample(step)]))
    with (tmp_path / SKIPPED_FILE).open("a") as file:
        file.write('{"step": 4, "spl')  # died while writing
    again = SkippedLog(tmp_path, 2, 0.01)
    assert [each["step"] for each in lines(tmp_path)] == [1, 2]
    again.add(3, "train", BatchCounts(8, [sample(3)]))
    assert [each["step"] for each in lines(tmp_path)] == [1, 2, 3]


def test_too_many_stop_the_run_with_examples(tmp_path):
    log = SkippedLog(tmp_path, 0, 0.01)
    log.add(1, "train", BatchCounts(20, [sample(number) for number in range(20)]))
    with pytest.raises(UserError, match=r"21 of the last 40 samples of train .*max_skipped_share is 0\.01.*row-99"):
        log.add(2, "train", BatchCounts(20, [sample(99)]))
    assert len(lines(tmp_path)) == 21


def test_eval_is_counted_apart(tmp_path):
    log = SkippedLog(tmp_path, 0, 0.01)
    log.add(1, "train", BatchCounts(20, [sample(number) for number in range(20)]))
    log.add(1, "eval", BatchCounts(20, [sample(number) for number in range(20)]))


def test_what_was_skipped_before_a_resume_counts(tmp_path):
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.write('{"step": 1, "loss": 2.0, "bins": 4}\n')  # of a version that did not count
        file.write('{"step": 2, "loss": 2.0, "samples": 20, "skipped_samples": 20}\n')
    log = SkippedLog(tmp_path, 2, 0.01)
    with pytest.raises(UserError, match="21 of the last 40 samples"):
        log.add(3, "train", BatchCounts(20, [sample(1)]))


@given(
    steps=st.lists(st.tuples(st.integers(0, 600), st.floats(0, 1)), min_size=1, max_size=60),
    share=st.floats(0, 1),
)
def test_the_limit_is_that_of_the_last_samples(steps, share):
    """Against a plain count over the fewest last steps that hold a window's samples."""
    steps = [(samples, int(samples * part)) for samples, part in steps]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skipped, "WINDOW", 1000)
        limit = SkipLimit(share)
        for done in range(1, len(steps) + 1):
            looked_at = next(
                (
                    steps[first:done]
                    for first in range(done - 1, -1, -1)
                    if sum(s for s, _ in steps[first:done]) >= 1000
                ),
                steps[:done],
            )
            samples, left_out = (sum(each) for each in zip(*looked_at))
            assert limit.count(*steps[done - 1]) == (left_out <= max(ALWAYS_ALLOWED, share * samples))


def test_one_percent_of_a_window_is_more_than_the_floor():
    limit = SkipLimit(0.01)
    assert all(limit.count(100, 1) for _ in range(3 * WINDOW // 100))
    assert not all(limit.count(100, 2) for _ in range(WINDOW // 100))


def test_travelling_as_bytes():
    each = [sample(1), SkippedSample("ü", 'a "b":1', "image_corrupt", "…")]
    assert skipped_from_array(skipped_to_array(each)) == each
    assert skipped_from_array(skipped_to_array([])) == []
