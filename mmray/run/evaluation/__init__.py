"""Whether a model reads: what it writes of a page, and how far that is from what stands there."""

from mmray.run.evaluation.metrics import Normalisation, RowScores, Scores, score_row
from mmray.run.evaluation.reading import Reader

__all__ = ["Normalisation", "Reader", "RowScores", "Scores", "score_row"]
