"""The reading accuracy of a model: the text it writes for a page, and how far that is from the page's text."""

from mmray.run.evaluation.metrics import Normalisation, RowScores, Scores, score_row
from mmray.run.evaluation.reading import Reader

__all__ = ["Normalisation", "Reader", "RowScores", "Scores", "score_row"]
