"""The columns of a prepared dataset's files. Token counts and ids are int32; sizes are pixels of the upright image."""

import pyarrow as pa

FORMAT_VERSION = 3
"""Raised when a change makes older prepared datasets unreadable or unequal."""

READ_VERSIONS = (2, 3)
"""Versions that are read. Of version 2 no sample tells its set, and what trains of chats was found by a scan alone."""

IMAGES = pa.list_(
    pa.struct(
        [
            ("uri", pa.string()),  # where the image lies; null when `data` holds it
            ("data", pa.large_binary()),  # large: the images of a window may be more than 2 GiB
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("sample", pa.int32()),  # number of its sample in the bin
            ("first_token", pa.int32()),  # in the bin: the tokens that stand for the image
            ("num_tokens", pa.int32()),
        ]
    )
)

BINS = pa.schema(
    [
        ("bucket", pa.string()),  # image shape its samples share, `mixed` or `text`
        ("num_tokens", pa.int32()),
        ("visual_tokens", pa.int32()),
        ("trained_tokens", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),  # the samples one after another
        ("sample_lengths", pa.list_(pa.int32())),
        ("sample_ids", pa.list_(pa.string())),
        ("sample_sources", pa.list_(pa.string())),  # file:line (JSONL) or file:row (Parquet)
        ("sample_rules", pa.list_(pa.int8())),  # masks.labels.LossRule
        ("sample_sets", pa.list_(pa.int32())),  # number of its set of rows in the split
        ("given", pa.list_(pa.bool_())),  # for LossRule.GIVEN: trained or not, per token; else empty
        ("images", IMAGES),
    ]
)

REJECTED = pa.schema(
    [
        ("id", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("source", pa.string()),
        ("row", pa.string()),  # the row as JSON, its first 500 characters
    ]
)

SAMPLES = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("dataset", pa.int32()),  # number of its set of rows; null where no one counts by sets
        ("rule", pa.int8()),
        ("bucket", pa.string()),
        ("visual_tokens", pa.int32()),
        ("visual_pairs", pa.int64()),  # sum over its tiles of visual tokens squared
        ("input_ids", pa.list_(pa.int32())),
        ("given", pa.list_(pa.bool_())),
        ("images", IMAGES),
        ("notes", pa.list_(pa.string())),  # what was passed over in its images
        ("reason", pa.string()),  # not null: a rejected row
        ("message", pa.string()),
        ("row", pa.string()),
        ("columns", pa.list_(pa.string())),  # of the row: those that its set is judged by
    ]
)
"""What an encoder hands to the packer: the samples and rejected rows of a chunk, in the order of its rows."""
