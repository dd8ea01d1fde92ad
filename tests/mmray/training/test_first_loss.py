"""The first loss of a training from pretrained weights is judged."""

import math

import pytest
from transformers import AutoConfig

from mmray.run.history import in_words
from mmray.training.first_loss import first_loss_problem
from mmray.training.settings import ModelSettings

CONFIG = AutoConfig.for_model("qwen2_vl")
"""Of 152,064 tokens."""
TRAINED = ModelSettings(path="/models/tuned")


@pytest.mark.parametrize("loss", [0.02, 0.8, 3.99])
def test_a_loss_of_trained_weights(loss: float) -> None:
    assert first_loss_problem(loss, 1000, TRAINED, CONFIG) is None


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (math.log(152_064), "the first loss is 11.93, as random weights: ln(vocabulary) is 11.93"),
        (math.log(152_064) * 0.91, "the first loss is 10.86, as random weights"),
        (4.01, "the first loss is 4.01, and /models/tuned should give 0.5 to 2: over 4"),
        (9.0, "another model's"),
        (14.0, "another model's"),
    ],
)
def test_a_loss_of_others(loss: float, said: str) -> None:
    problem = first_loss_problem(loss, 1000, TRAINED, CONFIG)
    assert problem is not None
    assert said in problem
    assert in_words({"event": "first_loss", "step": 1, "workers": 2, "loss": loss, "problem": problem}) == problem


def test_random_weights_and_steps_that_train_nothing_are_not_judged() -> None:
    random = ModelSettings(config={"model_type": "qwen2_vl"})
    assert first_loss_problem(11.9, 1000, random, CONFIG) is None
    assert first_loss_problem(0.0, 0, TRAINED, CONFIG) is None
