"""Defines the columns of a prepared dataset's files.

Token counts and ids are int32; sizes are in pixels of the upright image.
"""

import pyarrow as pa

FORMAT_VERSION = 3
"""Version of the format; a change that makes older prepared datasets unreadable or unequal increases it."""

READ_VERSIONS = (2, 3)
"""Versions that can be read. In version 2, samples do not name their data set, and only a scan for turn markers decided
which tokens of chats are trained on."""

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
        ("sample_rules", pa.list_(pa.int8())),  # loss.rules.LossRule
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
        ("dataset", pa.int32()),  # number of its set of rows; null when rows are not counted by sets
        ("rule", pa.int8()),
        ("bucket", pa.string()),
        ("visual_tokens", pa.int32()),
        ("visual_pairs", pa.int64()),  # sum over its tiles of visual tokens squared
        ("input_ids", pa.list_(pa.int32())),
        ("given", pa.list_(pa.bool_())),
        ("images", IMAGES),
        ("notes", pa.list_(pa.string())),  # oddities of its images that did not reject the row
        ("reason", pa.string()),  # not null: a rejected row
        ("message", pa.string()),
        ("row", pa.string()),
        ("columns", pa.list_(pa.string())),  # columns of the row by which its set is checked (`mmray.rows.columns`)
        ("copy", pa.int32()),  # 0 or null: taken for the first time; else how often it was taken before
    ]
)
"""Columns of the table that an encoder hands to the packer: the samples and rejected rows of a chunk, in row order."""
