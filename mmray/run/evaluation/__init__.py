"""The reading accuracy of a model: the text it writes for a page, and how far that is from the page's text."""

from mmray.run.evaluation.reading import Reader
from mmray.run.scoring.metrics import Normalisation, RowScores, Scores, score_row

__all__ = ["Normalisation", "Reader", "RowScores", "Scores", "score_row"]
