# ruff: noqa: F401
"""What ranks need, for the process that they are forked from."""

import gc

import pandas
import pyarrow.compute
import torch._inductor.compile_fx  # DeepSpeed's optimizers import it in their first step
import torch.utils.tensorboard
import transformers.models.qwen2_vl.modeling_qwen2_vl  # the model of most of these tests

import tests.here
import tests.mmray.run.export.cases
import tests.mmray.training.scenarios
from mmray.training.deepspeed_config import import_deepspeed

import_deepspeed()
gc.freeze()  # DeepSpeed collects garbage for every engine: half a second where all that is imported is looked at
