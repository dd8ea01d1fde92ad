"""Errors of readings, against values counted by hand."""

import pytest

from mmray.run.scoring import Normalisation, Scores, score_row
from mmray.run.scoring.settings import is_better


@pytest.mark.parametrize(
    ("reference", "prediction", "characters", "errors", "words", "word_errors"),
    [
        ("kitten", "sitting", 6, 3, 1, 1),  # k→s, e→i, +g
        ("Total 12.50", "Total 12.50", 11, 0, 2, 0),
        ("Total 12.50", "Total 1250", 11, 1, 2, 1),
        ("Total 12.50", "", 11, 11, 2, 2),
        ("", "Total", 0, 5, 0, 1),
        ("a b c", "a c", 5, 2, 3, 1),  # one word and its space
        ("one two", "two one", 7, 6, 2, 2),
        ("naïve", "naive", 5, 1, 1, 1),
        ("日本語", "日本", 3, 1, 1, 1),
    ],
)
def test_a_row_s_errors(reference, prediction, characters, errors, words, word_errors):
    row = score_row(reference, prediction)
    assert (row.characters, row.character_errors) == (characters, errors)
    assert (row.words, row.word_errors) == (words, word_errors)
    assert row.is_exact is (errors == 0)
    assert row.predicted_characters == len(prediction)


def test_one_two_is_six_edits_from_two_one():
    """By the table of the recurrence, filled by this test."""
    first, second = "one two", "two one"
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        row, above = [i], row
        for j, b in enumerate(second, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b)))
    assert row[-1] == score_row(first, second).character_errors


def test_rates_are_of_all_rows_together():
    """A page of 100 characters with 50 errors, and a line of 2 with none: 50 of 102, not the mean of 0.5 and 0."""
    page = score_row("ab" * 50, "a" * 50)
    line = score_row("12", "12")
    scores = Scores.of([page, line])
    assert page.character_errors == 50
    assert scores.rows == 2
    assert scores.cer == pytest.approx(50 / 102)
    assert scores.wer == pytest.approx(1 / 2)
    assert scores.normalised_edit_distance == pytest.approx(50 / 102)
    assert scores.exact_match == 0.5
    assert scores.length_ratio == pytest.approx(52 / 102)


def test_repetition_shows():
    scores = Scores.of([score_row("ab", "ab" * 10)])
    assert scores.cer == 9.0
    assert scores.length_ratio == 10.0
    assert scores.normalised_edit_distance == pytest.approx(18 / 20)


def test_without_characters_there_is_no_rate():
    scores = Scores.of([score_row("", "")])
    assert (scores.cer, scores.wer, scores.length_ratio, scores.exact_match) == (None, None, None, 1.0)
    assert Scores.of([]).exact_match is None
    assert score_row("", "a").cer is None


@pytest.mark.parametrize(
    ("settings", "same", "other"),
    [
        ({}, ("e\u0301", "é"), ("ﬁne", "fine")),
        ({"unicode": "NFKC"}, ("ﬁne Ａ", "fine A"), ("a", "A")),
        ({"unicode": None}, ("é", "é"), ("e\u0301", "é")),
        ({"ignore_case": True}, ("STRASSE", "straße"), ("a", "b")),
        ({}, ("a\n\n b ", "a b"), ("a b", "ab")),
        ({"white_space": "keep"}, ("a\nb", "a\nb"), ("a\nb", "a b")),
        ({"markdown": "strip"}, ("# Total\n\n- **12.50** `EUR`", "Total 12.50 EUR"), ("2 * 3", "2 3")),
        ({"markdown": "strip"}, ("| a | b |\n| --- | :-: |\n| 1 | 2 |", "a b 1 2"), ("a-b", "ab")),
        (
            {"markdown": "strip"},
            ("> see [the bill](http://a.b/c)\n1. snake_case", "see the bill\nsnake_case"),
            ("x", ""),
        ),
        ({"markdown": "keep"}, ("# a", "# a"), ("# a", "a")),
    ],
)
def test_what_is_no_error(settings, same, other):
    normalisation = Normalisation(**settings)
    assert score_row(*same, normalisation).is_exact
    assert not score_row(*other, normalisation).is_exact
    assert score_row(*other, normalisation).character_errors > 0


def test_what_is_not_a_number_is_never_the_best():
    """A run whose first evaluation overflowed still finds its best one."""
    for metric, better, worse in (("eval_loss", 1.0, 2.0), ("eval_exact_match", 0.5, 0.1)):
        assert not is_better(float("nan"), None, metric=metric, mode=None)
        assert not is_better(float("nan"), worse, metric=metric, mode=None)
        assert is_better(better, None, metric=metric, mode=None)
        assert is_better(worse, float("nan"), metric=metric, mode=None), "as a checkpoint of earlier versions may hold"
        assert is_better(better, worse, metric=metric, mode=None)
        assert not is_better(worse, better, metric=metric, mode=None)
        assert is_better(worse, better, metric=metric, mode="max" if metric == "eval_loss" else "min")
