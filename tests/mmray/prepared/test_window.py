"""A window of samples to bins: within capacity, whole, each once, shapes apart where that fills bins, sums right."""

import io
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.loss.labels import LabelMaker
from mmray.loss.roles import RoleBoundary
from mmray.loss.rules import LossRule
from mmray.packing.settings import PackingSettings
from mmray.prepared.sample_columns import BINS_PER_ROW_GROUP
from mmray.prepared.schema import BINS, REJECTED, SAMPLES
from mmray.prepared.window import Window, pack_window, samples_table
from mmray.rows.image_refs import ImageRef
from mmray.rows.sample import RejectedRow, Sample

MEDIA, START, END = 9, 100, 101
LABELS = LabelMaker(
    boundaries=(RoleBoundary("assistant", (START,), (END,)),),
    roles_to_train=("assistant",),
    train_on_eos="turn",
    media_token_ids=(MEDIA,),
)


def packing(tokens=20, visual=12, fill=0.9):
    return PackingSettings(token_capacity=tokens, visual_capacity=visual, bucket_fill=fill)


def sample(number, text=2, visual=0, bucket=None, rule=LossRule.ALL, **fields):
    """A sample: `text` tokens, then an image of `visual` tokens."""
    ids = np.asarray([10 + number % 80] * text + [MEDIA] * visual, dtype=np.int32)
    image = {"images": (ImageRef(f"{number}.jpg"),), "sizes": ((number, 7),), "blocks": np.asarray([[text, visual]])}
    made = {
        "id": f"id-{number}", "source": f"f:{number}", "rule": rule, "bucket": bucket or ("page" if visual else "text"),
        "visual_tokens": visual, "input_ids": ids,
    }  # fmt: skip
    return Sample(**made | (image if visual else {}) | fields)


def rejected(number):
    return RejectedRow(f"id-{number}", f"f:{number}", "empty_text", "text is empty", "{}")


def pack(rows, settings=None) -> Window:
    return pack_window(samples_table(rows), settings or packing(), LABELS)


def table(data):
    return pq.read_table(io.BytesIO(data))


def bins_of(window):
    return table(window.bins).to_pylist()


def members(window):
    return [each["sample_ids"] for each in bins_of(window)]


# ---- Laws ----


@st.composite
def windows(draw):
    """Samples of several buckets that all fit, trained or not, with rejected rows between them; and settings."""
    kinds = st.tuples(st.integers(0, 12), st.integers(0, 8), st.sampled_from(["2x3", "3x2", "mixed"]), st.booleans())
    rows = []
    for number, (text, visual, bucket, is_rejected) in enumerate(draw(st.lists(kinds, max_size=30))):
        if is_rejected and number % 3 == 0:
            rows.append(rejected(number))
        else:
            rows.append(sample(number, max(text, 0 if visual else 1), visual, bucket if visual else "text"))
    return rows, packing(fill=draw(st.sampled_from([0, 0.5, 0.9, 1])))


@given(windows())
@settings(deadline=None, max_examples=150)
def test_bins_hold_whole_samples_each_once_within_both_capacities(case):
    rows, settings_ = case
    window = pack(rows, settings_)
    by_id = {row.id: row for row in rows if isinstance(row, Sample)}
    trained = {row_id: max((row.input_ids != MEDIA)[1:].sum(), 0) for row_id, row in by_id.items()}
    bins = bins_of(window)
    for each in bins:
        assert each["num_tokens"] == len(each["input_ids"]) == sum(each["sample_lengths"]) <= settings_.token_capacity
        assert each["visual_tokens"] == each["input_ids"].count(MEDIA) <= settings_.visual_capacity
        assert each["trained_tokens"] == sum(trained[row_id] for row_id in each["sample_ids"])
        whole = [by_id[row_id] for row_id in each["sample_ids"]]
        assert each["input_ids"] == np.concatenate([row.input_ids for row in whole]).tolist()
        assert each["sample_sources"] == [row.source for row in whole]
        assert each["sample_rules"] == [row.rule for row in whole]
        starts = np.cumsum([0] + each["sample_lengths"])
        for image in each["images"]:
            first, count = image["first_token"], image["num_tokens"]
            assert starts[image["sample"]] <= first < first + count <= starts[image["sample"] + 1]
            assert set(each["input_ids"][first : first + count]) == {MEDIA}
            assert whole[image["sample"]].images[0].uri == image["uri"]
            assert (image["width"], image["height"]) == whole[image["sample"]].sizes[0]
        assert len(each["images"]) == sum(len(row.images) for row in whole)
        buckets = {row.bucket for row in whole}
        assert each["bucket"] == (buckets.pop() if len(buckets) == 1 else "mixed")
    usable = [row_id for row_id in by_id if trained[row_id]]
    assert Counter(row_id for each in bins for row_id in each["sample_ids"]) == Counter(usable)

    out = table(window.rejected).to_pylist()
    assert [row["id"] for row in out] == [row.id for row in rows if row.id not in usable]  # in the order of rows
    assert window.statistics == {
        "rows_read": len(rows),
        "rows_packed": len(usable),
        "rows_rejected": len(out),
        "rejected_by_reason": dict(sorted(Counter(row["reason"] for row in out).items())),
        "content": window.statistics["content"],
        "set_columns": window.statistics["set_columns"],
        "set_counts": window.statistics["set_counts"],
        "rows_repeated": 0,
        "bins": len(bins),
        "bins_at_least": window.statistics["bins_at_least"],
        "tokens": sum(each["num_tokens"] for each in bins),
        "visual_tokens": sum(each["visual_tokens"] for each in bins),
        "trained_tokens": sum(each["trained_tokens"] for each in bins),
        "images": sum(len(each["images"]) for each in bins),
        "sets": window.statistics["sets"],
        "image_notes": {},
        "examples": {},
    }
    assert window.statistics["bins_at_least"] <= len(bins)
    assert pack(rows, settings_) == window  # to the byte


# ---- Buckets ----


def test_samples_of_one_shape_are_together_and_the_rest_of_all_shapes_is_mixed():
    """Five of each shape fill two bins and half a third; the two halves share one."""
    rows = [sample(number, 6, 4, ("2x3", "3x2")[number % 2]) for number in range(10)]
    window = pack(rows)
    even, odd = ([f"id-{number}" for number in range(start, 10, 2)] for start in (0, 1))
    assert members(window) == [even[:2], even[2:4], odd[:2], odd[2:4], ["id-8", "id-9"]]
    assert [each["bucket"] for each in bins_of(window)] == ["2x3", "2x3", "3x2", "3x2", "mixed"]


def test_leftovers_of_one_shape_keep_its_name():
    assert [each["bucket"] for each in bins_of(pack([sample(0, 3, 4, "2x3")]))] == ["2x3"]


def test_a_bin_is_full_by_either_capacity():
    """12 of 12 visual tokens: kept apart, though the tokens are few."""
    rows = [sample(0, 2, 12, "2x3"), sample(1, 2, 3, "3x2"), sample(2, 2, 3, "mixed")]
    assert [each["bucket"] for each in bins_of(pack(rows))] == ["2x3", "mixed"]


def test_bucket_fill_0_never_mixes_and_1_mixes_all_but_full_bins():
    rows = [sample(number, 3, 6, ("2x3", "3x2")[number % 2]) for number in range(2)]
    assert members(pack(rows, packing(fill=0))) == [["id-0"], ["id-1"]]
    assert members(pack(rows, packing(fill=1))) == [["id-0", "id-1"]]
    full = [sample(0, 14, 6, "2x3"), *rows[1:]]
    assert members(pack(full, packing(fill=1))) == [["id-0"], ["id-1"]]


# ---- What is trained ----


def chat(number, *tokens, **fields):
    return sample(number, rule=LossRule.ROLES, input_ids=np.asarray(tokens, dtype=np.int32), **fields)


def test_a_sample_with_nothing_to_train_is_set_aside_with_its_reason():
    rows = [
        chat(0, 1, START, 5, END),
        chat(1, 1, 2, 3),
        chat(2, START),
        sample(3, 1, 8),  # its only text is its first token, which is never trained
        sample(4, rule=LossRule.GIVEN, given_mask=np.asarray([True, False])),
        sample(5, rule=LossRule.GIVEN, given_mask=np.asarray([False, True])),
    ]
    window = pack(rows)
    assert members(window) == [["id-0", "id-5"]]
    assert [each["trained_tokens"] for each in bins_of(window)] == [3]
    out = table(window.rejected).to_pylist()
    assert [(row["id"], row["reason"], row["source"]) for row in out] == [
        (f"id-{number}", "nothing_trained", f"f:{number}") for number in (1, 2, 3, 4)
    ]
    assert "`loss` in the job file" in out[0]["message"]
    assert window.statistics["rejected_by_reason"] == {"nothing_trained": 4}


def test_samples_with_nothing_to_train_are_kept_where_that_is_allowed():
    rows = [chat(0, 1, START, 5, END), chat(1, 1, 2, 3), rejected(2)]
    window = pack_window(samples_table(rows), packing(), LABELS, allow_empty=True)
    assert members(window) == [["id-0", "id-1"]]
    assert window.statistics["rejected_by_reason"] == {"empty_text": 1}
    assert [each["trained_tokens"] for each in bins_of(window)] == [2]


def test_given_masks_stand_beside_samples_without_one():
    rows = [
        sample(0, 3),
        sample(1, 4, rule=LossRule.GIVEN, given_mask=np.asarray([True, True, False, True])),
        chat(2, 1, START, 5, END),
    ]
    (each,) = bins_of(pack(rows))
    assert each["sample_rules"] == [0, 2, 1]
    assert each["given"] == [False] * 3 + [True, True, False, True] + [False] * 4
    assert each["trained_tokens"] == 2 + 2 + 2
    (without,) = bins_of(pack([rows[0], rows[2]]))
    assert without["given"] == []


def test_a_turn_left_open_ends_with_its_sample():
    (each,) = bins_of(pack([chat(0, 1, START, 5, 6), sample(1, 1), chat(2, 7, 8, START, 5)]))
    assert each["sample_ids"] == ["id-0", "id-2"]  # the second has one token: nothing trained
    assert each["trained_tokens"] == 3


# ---- Edges ----


def test_an_empty_window_has_files_too():
    window = pack([])
    assert table(window.bins).schema.equals(BINS)
    assert table(window.rejected).schema.equals(REJECTED)
    assert window.statistics["rows_read"] == window.statistics["bins"] == window.statistics["bins_at_least"] == 0


def test_a_window_of_rejected_rows_alone():
    window = pack([rejected(0), rejected(1)])
    assert table(window.bins).num_rows == 0
    assert table(window.rejected)["id"].to_pylist() == ["id-0", "id-1"]
    assert window.statistics["rejected_by_reason"] == {"empty_text": 2}


@pytest.mark.parametrize("data", [b"\x89PNG", None])
def test_images_of_a_row_travel_with_their_bytes_or_their_place(data):
    image = ImageRef(data=data) if data else ImageRef("a.jpg")
    (each,) = bins_of(pack([sample(0, 2, 3), sample(1, 2, 3, images=(image,))]))
    assert each["images"][1]["data"] == data
    assert each["images"][1]["uri"] == (None if data else "a.jpg")
    assert each["images"][0]["data"] is None


def test_samples_go_to_the_packer_and_back_unchanged():
    """The table between the actors holds all that packing needs, in the order of rows."""
    rows = [sample(0, 2, 3), rejected(1), chat(2, 1, START, END)]
    there = samples_table(rows)
    assert there.schema.equals(SAMPLES)
    assert there["id"].to_pylist() == ["id-0", "id-1", "id-2"]
    assert there["reason"].to_pylist() == [None, "empty_text", None]
    assert pack_window(there.slice(0, 2), packing(), LABELS) == pack(rows[:2])


def test_bins_stand_in_row_groups_that_are_read_together():
    window = pack([sample(number, 20) for number in range(BINS_PER_ROW_GROUP * 2 + 1)])
    file = pq.ParquetFile(io.BytesIO(window.bins))
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    assert sizes == [BINS_PER_ROW_GROUP, BINS_PER_ROW_GROUP, 1]
