"""How well texts are read, and the settings of an evaluation: what needs neither a model nor torch."""

from mmray.run.scoring.metrics import Normalisation, RowScores, Scores, score_row
from mmray.run.scoring.settings import EarlyStoppingSettings, EvaluationSettings, GenerateSettings, KeepBestSettings

__all__ = [
    "EarlyStoppingSettings",
    "EvaluationSettings",
    "GenerateSettings",
    "KeepBestSettings",
    "Normalisation",
    "RowScores",
    "Scores",
    "score_row",
]
