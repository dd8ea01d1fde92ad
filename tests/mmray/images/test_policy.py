"""Tiling settings: what they mean, and every contradiction refused by name."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mmray.images import OverviewBucket, ShapeBucket, TilingPolicy

SIZE = [448, 448]


def refusal(**fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        TilingPolicy.model_validate(fields)
    return str(caught.value)


def test_nothing_set_cuts_nothing() -> None:
    policy = TilingPolicy()
    assert not policy.is_tiled
    assert (policy.shape_buckets, policy.overview_buckets, policy.tile_size) == ((), (), None)


@pytest.mark.parametrize(
    "fields",
    [
        {"preset": "ocr_pages"},
        {"grid": [1, 1], "tile_size": SIZE},
        {"buckets": [{"grid": [1, 2]}], "tile_size": SIZE},
    ],
)
def test_each_of_the_three_asks_for_tiles(fields: dict[str, Any]) -> None:
    assert TilingPolicy.model_validate(fields).is_tiled


def test_the_preset() -> None:
    policy = TilingPolicy(preset="ocr_pages")
    assert [(b.max_ratio, b.grid) for b in policy.shape_buckets] == [
        (0.9, (3, 2)),
        (1.7, (2, 3)),
        (None, (2, 4)),
    ]
    assert policy.tile_size == (512, 512)
    assert TilingPolicy(preset="ocr_pages", tile_size=(384, 256)).tile_size == (384, 256)
    assert TilingPolicy(preset="ocr_pages", native_resolution=True).tile_size is None


def test_from_the_job_file() -> None:
    policy = TilingPolicy.model_validate(
        {
            "buckets": [{"max_ratio": 1, "grid": [3, 2]}, {"grid": [2, 3]}],
            "tile_size": [448, 336],
            "overview": [{"max_ratio": 1, "size": [448, 336]}, {"max_ratio": None, "size": [336, 448]}],
            "pad_color": [0, 0, 0],
        }
    )
    assert policy.buckets == (ShapeBucket(max_ratio=1.0, grid=(3, 2)), ShapeBucket(grid=(2, 3)))
    assert policy.tile_size == (448, 336)
    assert policy.overview_buckets[1] == OverviewBucket(size=(336, 448))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"preset": "ocr_pages", "overview": SIZE, "labels": True},
        {"preset": "ocr_pages", "native_resolution": True},
        {
            "buckets": [{"max_ratio": 1, "grid": [3, 2]}, {"grid": [2, 3]}],
            "tile_size": SIZE,
            "patch_multiple": 28,
        },
        {"grid": [2, 2], "tile_size": SIZE, "overview": [{"max_ratio": 1, "size": [9, 9]}, {"size": [8, 8]}]},
        {
            "buckets": [
                {"max_ratio": 1, "grid": [2, 1], "tile_size": 448, "overlap": 0.1, "min_area": 900},
                {"grid": [1, 1], "tile_size": [64, 32], "overview": False},
            ],
            "overview": SIZE,
            "labels": "tokens",
        },
    ],
)
def test_a_policy_survives_being_written_and_read(fields: dict[str, Any]) -> None:
    policy = TilingPolicy.model_validate(fields)
    assert TilingPolicy.model_validate(policy.model_dump(mode="json")) == policy
    assert TilingPolicy.model_validate_json(policy.model_dump_json()) == policy


def test_a_record_says_of_a_bucket_what_it_sets_alone() -> None:
    """So that a dataset that was prepared before buckets had more settings stays the job's."""
    buckets = [{"max_ratio": 1, "grid": [3, 2]}, {"grid": [2, 3], "overlap": 0}]
    policy = TilingPolicy.model_validate({"buckets": buckets, "tile_size": 8})
    assert policy.record()["buckets"] == [
        {"max_ratio": 1.0, "grid": [3, 2]},
        {"max_ratio": None, "grid": [2, 3], "overlap": 0.0},
    ]


def test_sizes_of_buckets_follow_the_model() -> None:
    buckets = [{"max_ratio": 1, "grid": [2, 1], "tile_size": 100, "overview": [50, 70]}, {"grid": [1, 1]}]
    policy = TilingPolicy.model_validate({"buckets": buckets, "tile_size": 30})
    assert set(policy.fixed_sizes) == {(100, 100), (50, 70), (30, 30)}
    assert set(policy.aligned(28).fixed_sizes) == {(112, 112), (56, 84), (28, 28)}
    assert set(policy.with_fixed_tiles((64, 64)).fixed_sizes) == {(64, 64)}


def test_every_field_is_documented() -> None:
    for model in (TilingPolicy, ShapeBucket, OverviewBucket):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


# ------------------------------------------------------------ contradictions

TWO_GRIDS = [
    {"preset": "ocr_pages", "grid": [2, 2]},
    {"preset": "ocr_pages", "buckets": [{"grid": [2, 2]}]},
    {"grid": [2, 2], "buckets": [{"grid": [2, 2]}], "tile_size": SIZE},
]


@pytest.mark.parametrize("fields", TWO_GRIDS)
def test_two_grids(fields: dict[str, Any]) -> None:
    message = refusal(**fields)
    names = [name for name in ("preset", "grid", "buckets") if name in fields]
    assert f"{names[0]} and {names[1]} exclude each other; keep one" in message


def test_sizes_of_buckets_that_do_not_fit() -> None:
    sized = {"grid": [1, 1], "tile_size": 64}
    assert "native_resolution exclude each other" in refusal(buckets=[sized], native_resolution=True)
    assert "tile_size: buckets needs it" in refusal(buckets=[{"max_ratio": 1, **sized}, {"grid": [1, 2]}])
    assert TilingPolicy.model_validate({"buckets": [{"max_ratio": 1, **sized}, sized]}).tile_size is None


SETTINGS_OF_TILES = [
    ("tile_size", SIZE),
    ("native_resolution", True),
    ("max_tile_pixels", 99),
    ("overlap", 0.1),
    ("min_area", 1),
    ("overview", SIZE),
    ("overview", [{"size": SIZE}]),
    ("no_upscale", True),
    ("pad_color", [0, 0, 0]),
    ("reading_order", "rtl"),
    ("labels", True),
    ("exact_pixels", True),
]


@pytest.mark.parametrize(("field", "value"), SETTINGS_OF_TILES)
def test_a_setting_without_tiles(field: str, value: object) -> None:
    message = refusal(**{field: value})
    assert f"{field}: without effect" in message
    assert "set preset, grid or buckets" in message


def test_all_settings_without_tiles_are_named() -> None:
    assert "tile_size, labels: without effect" in refusal(tile_size=SIZE, labels=True)


def test_the_list_above_is_whole() -> None:
    """A new field is refused for uncut pages too, or stands here as one that means something for them."""
    refused = {field for field, _ in SETTINGS_OF_TILES}
    of_whole_pages = {"patch_multiple", "pdf_dpi", "max_pixels", "min_pixels"}
    assert set(TilingPolicy.model_fields) - refused == {"preset", "grid", "buckets"} | of_whole_pages


def test_defaults_written_out_are_no_contradiction() -> None:
    assert TilingPolicy(overlap=0, labels=False, pad_color=(255, 255, 255), patch_multiple=28) == TilingPolicy(
        patch_multiple=28
    )


@pytest.mark.parametrize("fields", [{"grid": [2, 2]}, {"buckets": [{"grid": [2, 2]}]}])
def test_tiles_of_no_size(fields: dict[str, Any]) -> None:
    message = refusal(**fields)
    assert f"tile_size: {next(iter(fields))} needs it" in message
    assert "native_resolution" in message


@pytest.mark.parametrize("fields", [{"grid": [2, 2]}, {"preset": "ocr_pages"}])
def test_tiles_of_two_sizes(fields: dict[str, Any]) -> None:
    message = refusal(**fields, tile_size=SIZE, native_resolution=True)
    assert "tile_size and native_resolution exclude each other; keep one" in message


def test_no_upscale_of_what_is_never_scaled() -> None:
    assert "no_upscale: without effect" in refusal(grid=[2, 2], native_resolution=True, no_upscale=True)
    TilingPolicy(grid=(2, 2), native_resolution=True, no_upscale=True, overview=(448, 448))


@pytest.mark.parametrize(("field", "entry"), [("buckets", {"grid": [2, 2]}), ("overview", {"size": SIZE})])
@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ([], "end with max_ratio: null"),
        ([1.0], "end with max_ratio: null"),
        ([1.0, 2.0], "end with max_ratio: null"),
        ([None, None], "only the last"),
        ([1.0, None, 2.0, None], "only the last"),
        ([2.0, 1.0, None], r"must ascend from bucket to bucket, not [2.0, 1.0]"),
        ([1.0, 1.0, None], "must ascend"),
    ],
)
def test_buckets_that_do_not_cover_every_shape_once(
    field: str, entry: dict[str, Any], ratios: list[float | None], words: str
) -> None:
    base = {"tile_size": SIZE} if field == "buckets" else {"tile_size": SIZE, "grid": [2, 2]}
    message = refusal(**base, **{field: [{**entry, "max_ratio": ratio} for ratio in ratios]})
    assert f"{field}: " in message
    assert words in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("preset", "ocr"),
        ("grid", [0, 2]),
        ("grid", [2]),
        ("tile_size", [448, 0]),
        ("overlap", 0.5),
        ("overlap", -0.1),
        ("overlap", float("nan")),
        ("min_area", -1),
        ("overview", [0, 448]),
        ("pad_color", [0, 0, 256]),
        ("reading_order", "ttb"),
        ("grid", [1000, 1000]),
        ("buckets", [{"grid": [33, 32]}]),
        ("patch_multiple", 0),
        ("buckets", [{"max_ratio": 0, "grid": [2, 2]}, {"grid": [2, 2]}]),
        ("buckets", [{"max_ratio": float("inf"), "grid": [2, 2]}, {"grid": [2, 2]}]),
        ("columns", 2),
    ],
)
def test_values_out_of_range(field: str, value: object) -> None:
    base = {} if field in ("preset", "grid", "buckets") else {"grid": [2, 2]}
    assert field in refusal(**{"tile_size": SIZE, **base, field: value})


def test_a_policy_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        TilingPolicy().labels = True  # type: ignore[misc]


# ------------------------------------------------------------ fitting a model family


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 64))
def test_aligned_sizes_are_the_nearest_multiples(width: int, height: int, multiple: int) -> None:
    policy = TilingPolicy(grid=(2, 2), tile_size=(width, height), overview=(height, width)).aligned(multiple)
    assert policy.patch_multiple == multiple
    assert policy.tile_size is not None
    assert policy.overview == policy.tile_size[::-1]
    for asked, given_ in zip((width, height), policy.tile_size):
        assert given_ % multiple == 0
        assert given_ == multiple or abs(given_ - asked) * 2 <= multiple
        assert given_ >= multiple
        assert asked < multiple or abs(given_ - asked) * 2 <= multiple
    assert policy.aligned(multiple) == policy


def test_aligned_keeps_all_else() -> None:
    policy = TilingPolicy(preset="ocr_pages", overlap=0.1, labels=True, reading_order="rtl", pad_color=(1, 2, 3))
    assert policy.aligned(28) == policy.model_copy(update={"tile_size": (504, 504), "patch_multiple": 28})
    assert policy.tile_size == (512, 512)
    native = TilingPolicy(grid=(2, 2), native_resolution=True)
    assert native.aligned(28) == native.model_copy(update={"patch_multiple": 28})
    assert TilingPolicy().aligned(28) == TilingPolicy(patch_multiple=28)


def test_aligned_overviews_by_shape() -> None:
    overview = (OverviewBucket(max_ratio=1, size=(450, 330)), OverviewBucket(size=(10, 450)))
    policy = TilingPolicy(grid=(2, 2), tile_size=(448, 448), overview=overview).aligned(28)
    assert policy.overview == (OverviewBucket(max_ratio=1, size=(448, 336)), OverviewBucket(size=(28, 448)))


@pytest.mark.parametrize("multiple", [0, -28])
def test_aligned_to_nothing(multiple: int) -> None:
    for policy in (TilingPolicy(), TilingPolicy(grid=(2, 2), tile_size=(448, 448))):
        with pytest.raises(ValueError, match=str(multiple)):
            policy.aligned(multiple)


def test_fixed_tiles() -> None:
    policy = TilingPolicy(preset="ocr_pages", overview=(100, 200), labels=True).with_fixed_tiles((512, 384))
    assert policy == TilingPolicy(preset="ocr_pages", tile_size=(512, 384), overview=(512, 384), labels=True)
    assert TilingPolicy(preset="ocr_pages").with_fixed_tiles((64, 64)).overview is None
    by_shape = TilingPolicy(grid=(2, 2), tile_size=(9, 9), overview=(OverviewBucket(size=(8, 8)),))
    assert by_shape.with_fixed_tiles((64, 64)).overview == (64, 64)
    assert TilingPolicy().with_fixed_tiles((64, 64)) == TilingPolicy()


def test_fixed_tiles_contradict_native_resolution() -> None:
    with pytest.raises(ValueError, match=r"native_resolution: .* 512 x 512 .*remove"):
        TilingPolicy(grid=(2, 2), native_resolution=True).with_fixed_tiles((512, 512))


# ------------------------------------------------------------ sizes of pages, short forms, records


@pytest.mark.parametrize(
    ("written", "meant"),
    [("white", (255, 255, 255)), ("#102030", (16, 32, 48)), ("Gray", (128, 128, 128)), ([1, 2, 3], (1, 2, 3))],
)
def test_colours_have_names(written: object, meant: tuple[int, int, int]) -> None:
    policy = TilingPolicy.model_validate({"preset": "ocr_pages", "pad_color": written})
    assert policy.pad_color == meant
    assert policy.model_dump(mode="json")["pad_color"] == list(meant)


@pytest.mark.parametrize("written", ["no colour", "#12", "rgba(1,2,3,4)", [1, 2], [1, 2, 256]])
def test_what_is_no_colour(written: object) -> None:
    with pytest.raises(ValueError, match="pad_color"):
        TilingPolicy.model_validate({"preset": "ocr_pages", "pad_color": written})


def test_one_number_is_a_square() -> None:
    assert TilingPolicy.model_validate({"grid": [2, 2], "tile_size": 448}).tile_size == (448, 448)
    for wrong in (0, True, "448"):
        with pytest.raises(ValueError, match="tile_size"):
            TilingPolicy.model_validate({"grid": [2, 2], "tile_size": wrong})


def test_pixels_of_whole_pages_where_they_say_nothing() -> None:
    assert "min_pixels (9) is more than max_pixels (8)" in refusal(min_pixels=9, max_pixels=8)
    assert "size pages that are not cut" in refusal(preset="ocr_pages", max_pixels=9)
    assert "max_tile_pixels: without effect" in refusal(preset="ocr_pages", max_tile_pixels=9)


def test_settings_that_came_later_stand_in_records_only_where_they_say_something() -> None:
    assert TilingPolicy().record() == {
        name: value for name, value in TilingPolicy().model_dump(mode="json").items()
        if name not in ("pdf_dpi", "max_pixels", "min_pixels", "max_tile_pixels")
    }  # fmt: skip
    said = TilingPolicy(pdf_dpi=200, max_pixels=10**6, min_pixels=10)
    assert TilingPolicy.model_validate(said.record()) == said
    native = TilingPolicy(grid=(2, 2), native_resolution=True, max_tile_pixels=999)
    assert TilingPolicy.model_validate(native.record()) == native
