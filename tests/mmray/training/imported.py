# ruff: noqa: F401
"""What ranks need, for the process that they are forked from."""

import gc

import pandas
import PIL.Image
import pyarrow.compute
import torch._inductor.compile_fx  # DeepSpeed's optimizers import it in their first step
import torch.profiler._cupti_monitor
import torch.utils.tensorboard
import transformers.models.qwen2_vl.image_processing_pil_qwen2_vl
import transformers.models.qwen2_vl.modeling_qwen2_vl  # the model of most of these tests
import transformers.models.qwen2_vl.processing_qwen2_vl
from numba.core.registry import cpu_target

import tests.here
import tests.mmray.run.export.cases
import tests.mmray.training.scenarios
from mmray.training.deepspeed_config import import_deepspeed

import_deepspeed()

import deepspeed.checkpoint.ds_to_universal  # noqa: E402  what the converter imports
import deepspeed.module_inject.auto_ep_layer  # noqa: E402  these two: what an engine imports
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402

PIL.Image.init()
cpu_target.typing_context.refresh()  # numba's own functions, before the first of ours
cpu_target.target_context.refresh()
gc.freeze()  # DeepSpeed collects garbage for every engine: half a second where all that is imported is looked at
