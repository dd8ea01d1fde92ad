"""A check of the first loss, which shows whether pretrained weights, template and processor belong together.

A model that has learned text of the same kind gives 0.5 to 2 nats a token. At ln(vocabulary) every token is as likely
as every other: the weights were not loaded, or are another model's. In between, the template or the processor is not
the model's.
"""

import math

from transformers import PretrainedConfig

from mmray.training.settings import ModelSettings

HIGHEST = 4.0
"""Highest plausible first loss, in nats a token."""
LIKE_RANDOM = 0.1
"""Distance from ln(vocabulary), as a share of it, within which a loss is that of random weights."""


def first_loss_problem(loss: float, trained_tokens: int, model: ModelSettings, config: PretrainedConfig) -> str | None:
    """The problem with the loss of the first step, in nats a token; None for none, or where it cannot be told.

    config: that of the trained model.
    """
    if model.path is None or not trained_tokens:
        return None
    even = math.log(config.get_text_config().vocab_size)
    remedy = "stop the run and look: mmray doctor compares weights, processor and template with the model"
    if abs(loss - even) < LIKE_RANDOM * even:
        return (
            f"the first loss is {loss:.2f}, as random weights: ln(vocabulary) is {even:.2f}, and {model.path} should "
            f"give 0.5 to 2; {remedy}"
        )
    if loss > HIGHEST:
        return (
            f"the first loss is {loss:.2f}, and {model.path} should give 0.5 to 2: over {HIGHEST:g} the template, the "
            f"processor or the weights are another model's; {remedy}"
        )
    return None
