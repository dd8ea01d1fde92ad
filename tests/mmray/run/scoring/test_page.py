"""The page of an evaluation: what it marks, and that nothing of the data is markup."""

import pytest

from mmray.run.scoring.metrics import Normalisation, score_row
from mmray.run.scoring.page import evaluation_page, marked
from mmray.run.scoring.results import BadRow, RowResult, ShownRows, from_parquet, metrics, to_parquet


@pytest.mark.parametrize(
    ("reference", "prediction", "left", "right"),
    [
        ("Total 12", "Total 12", "Total 12", "Total 12"),
        ("abc", "ac", 'a<mark class="missing">b</mark>c', "ac"),
        ("ac", "abc", "ac", 'a<mark class="extra">b</mark>c'),
        ("abc", "axc", 'a<mark class="missing">b</mark>c', 'a<mark class="extra">x</mark>c'),
        ("<b>", "", '<mark class="missing">&lt;b&gt;</mark>', ""),
        ("a b", "a\nb", "a b", "a↵\nb"),  # white space counts as one space
    ],
)
def test_differences_are_marked(reference: str, prediction: str, left: str, right: str) -> None:
    assert tuple(map(str, marked(reference, prediction, Normalisation()))) == (left, right)


def test_white_space_is_marked_where_it_counts() -> None:
    sides = marked("a b", "a\nb", Normalisation(white_space="keep"))
    assert all("<mark" in side for side in sides)


def result(number: int, reference: str, prediction: str, picture: bytes | None = None) -> RowResult:
    return RowResult(
        number=number, id=f"row-{number}", source=f"rows.jsonl:{number}", set="0", bucket="1x1", loss_sum=1.0,
        trained_tokens=4, turn=0, reference=reference, prediction=prediction, stopped=True, predicted_tokens=3,
        scores=score_row(reference, prediction), picture=picture,
    )  # fmt: skip


def test_worst_median_and_best_rows_are_shown_once() -> None:
    results = [result(number, "x" * 30, "x" * (30 - number)) for number in range(30)]
    shown = ShownRows.of(results, each_kind=3)
    assert shown.worst == (29, 28, 27)
    assert shown.best == (0, 1, 2)
    assert len(set(shown.all)) == 9
    assert all(10 < place < 20 for place in shown.median)
    few = ShownRows.of(results[:4], each_kind=3)
    assert sorted(few.all) == [0, 1, 2, 3]


def test_the_page_needs_nothing_else_and_escapes_what_rows_hold() -> None:
    evil = "<script>alert(1)</script>"
    results = [result(0, evil, "no"), result(1, "same", "same", b"jpeg")]
    bad = [BadRow(evil, "rows.jsonl:9", "0", "image_missing", "gone")]
    values = metrics(results, bad, step=8, model="m", normalisation=Normalisation().model_dump())
    page = evaluation_page(values, results, ShownRows.of(results), title=evil)
    assert "<script" not in page
    assert "data:image/jpeg;base64,anBlZw==" in page
    assert "image_missing" in page


def test_results_come_back_from_parquet() -> None:
    results = [
        result(0, "ab", "a", b"jpeg"),
        RowResult(number=1, id="b", source="rows.jsonl:1", set="0", bucket="text", loss_sum=2.0, trained_tokens=3),
    ]
    back, metadata = from_parquet(to_parquet(results, bad=["x"]))
    assert back == results
    assert metadata == {"bad": ["x"]}
    assert from_parquet(to_parquet(results, shown=()))[0][0].picture is None
