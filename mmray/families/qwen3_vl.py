"""Qwen3-VL and its mixture of experts: Qwen2-VL's tokens, template and positions, with patches of 16 pixels.

Features of inner vision layers are added to text layers at the picture's tokens, so they stay in their sample. Video,
which has time stamps as text here, is not read.
"""

from mmray.families.parts import Parts
from mmray.families.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    """Qwen3-VL, dense and with experts (images; video is not read)."""

    model_types = ("qwen3_vl", "qwen3_vl_moe")
    processor_classes = ("Qwen3VLProcessor",)
    module_names = Parts(
        vision=("model.visual",), projector=("model.visual.merger", "model.visual.deepstack_merger_list")
    )
