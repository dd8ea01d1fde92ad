from mmray.base.words import counted, file_size


def test_counts_agree_with_their_nouns() -> None:
    assert [counted(count, "bin") for count in (0, 1, 2, 1200)] == ["0 bins", "1 bin", "2 bins", "1,200 bins"]
    assert [counted(count, "micro-batch") for count in (1, 3)] == ["1 micro-batch", "3 micro-batches"]


def test_no_file_is_empty_by_its_unit() -> None:
    assert [file_size(size) for size in (1_234, 34_567, 2_345_678, 5_670_000_000)] == [
        "1.2 kB",
        "34.6 kB",
        "2.3 MB",
        "5.67 GB",
    ]
