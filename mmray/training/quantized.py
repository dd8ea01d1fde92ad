"""The base of an adapter in 4 bits: nf4 of bitsandbytes, for the linear layers of the language model.

The language model holds most of the weights; the vision tower and what joins it to the text lose more by four bits than
they save. Weights are quantised while they are loaded, one at a time. bitsandbytes has a second way of computing on
CPUs with AVX-512, taken in evaluation: it repacks the weights for good, so that training could not go on after an
evaluation, computes in bf16 and refuses most widths. It is switched off: every width works, and evaluation and training
compute the same numbers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmray.errors import UserError
from mmray.families import model_parts
from mmray.training.router_loss import router_modules


def quantised_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers of a model that are quantised. model: not quantised, also on the meta device."""
    parts = model_parts(model)
    routers = {id(module) for router in router_modules(model) for module in router.modules()}
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and id(module) not in routers and parts.part_of(f"{name}.weight") == "language"
    ]


def loading_options(empty: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The arguments of `from_pretrained` with which a model is quantised while it is loaded onto `device`.

    empty: the model without weights. Raises UserError where bitsandbytes is not installed, or the files are quantised
    already.
    """
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(f"model.quantize needs bitsandbytes: pip install 'mmray[bitsandbytes]' ({error})") from error
    if getattr(empty.config, "quantization_config", None):
        raise UserError("model.quantize: the files of model.path are quantised already; give those in bf16 or fp32")
    layers = set(quantised_layers(empty))
    others = [name for name, module in empty.named_modules() if isinstance(module, nn.Linear) and name not in layers]
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=others,
        ),
        "device_map": {"": device},
    }  # fmt: skip


def as_in_training(model: PreTrainedModel) -> None:
    """Lets quantised layers compute in evaluation as they do in training, and keeps their scales, which belong to the
    files of the base, out of checkpoints."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.register_state_dict_post_hook(_without_scales)


def _without_scales(_: nn.Module, state: dict[str, Any], prefix: str, __: dict[str, Any]) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]


def rounded(weight: Tensor) -> Tensor:
    """The weight as a quantised layer has it: quantised, and turned back into numbers of its own dtype."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    values: Tensor = dequantize_4bit(codes, state)
    return values.to(weight.dtype)
