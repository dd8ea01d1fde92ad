"""What ranks need, for the process that they are forked from."""

from mmray.training.deepspeed_config import import_deepspeed
from tests.mmray.training import part_scenarios, scenarios  # noqa: F401

import_deepspeed()
