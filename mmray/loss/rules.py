"""Names for what is trained on, without PyTorch: processes that only read a prepared dataset need 200 MB less."""

from enum import IntEnum

IGNORE_INDEX = -100
"""The label of a token that is not trained on: the `ignore_index` of PyTorch's cross-entropy."""


class LossRule(IntEnum):
    """Says how a sample's trained tokens are determined."""

    ALL = 0
    """Every token except media is trained on."""
    ROLES = 1
    """The turns of the roles to train on are found by their boundaries during training."""
    GIVEN = 2
    """A mask with one entry a token, stored when preparing: what the row itself or its chat template says."""
