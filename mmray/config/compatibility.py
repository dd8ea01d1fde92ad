"""Whether model, processor and settings of a job fit together: checked before any work, on the driver."""

import torch
from transformers import PretrainedConfig
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK
from transformers.utils.import_utils import KERNELS_MIN_VERSION, is_flash_attn_2_available

from mmray.config.job import Job
from mmray.errors import UserError
from mmray.families import Family, load_family
from mmray.packing.settings import PackingSettings
from mmray.training.flash_attention import flash_problem
from mmray.training.inline_config import check_inline_keys
from mmray.training.model import empty_model, load_config
from mmray.training.settings import ModelSettings


def job_family(job: Job) -> Family:
    """The family of a job's model and processor, which fit together and to the packing. Raises UserError."""
    config, family = fitting_family(job)
    check_attention(job.model)
    check_packing(config, family, job.packing, job.training.micro_batch_bins)
    if job.evaluation is not None and job.evaluation.prompt is not None:
        check_evaluation_prompt(family, job.evaluation.prompt)
    return family


def fitting_family(job: Job) -> tuple[PretrainedConfig, Family]:
    """The configuration of a job's model and the family of its processor, which fit together. Raises UserError."""
    config = load_config(job.model)
    family = load_family(
        job.model.processor_source,
        tiled=job.images.is_tiled,
        model_type=config.model_type,
        trust_remote_code=job.model.trust_remote_code,
    )
    if isinstance(job.model.config, dict):
        check_inline_keys(config, job.model.config)
    check_model(config, family)
    check_token_ids(config, family, job.model)
    return config, family


def check_model(config: PretrainedConfig, family: Family) -> None:
    """Raise UserError when the processor is not one of the model's, or the model would train wrongly as it is set up.

    config: `load_config` of the job's model.
    """
    name, expected = type(family.processor).__name__, family.config_image_token_id(config)
    if expected != family.image_token_id:
        raise UserError(
            f"the model's image token is {expected}, that of {name} is {family.image_token_id}; "
            "set model.processor to the model's own"
        )
    problem = family.model_problem(config)
    if problem:
        raise UserError(f"a {config.model_type} cannot train like this: {problem}")


def check_token_ids(config: PretrainedConfig, family: Family, settings: ModelSettings) -> None:
    """Raise UserError when the tokenizer can give an id that the model has no vector for, and is not to get one.

    It would end in an index error in the middle of training, on a GPU in an assertion of the device.
    """
    rows, ids = family.embedding_rows(config), family.num_token_ids
    if ids > rows and not settings.resize_embeddings:
        tokens = [repr(family.tokenizer.convert_ids_to_tokens(number)) for number in range(rows, min(ids, rows + 3))]
        more = ", …" if ids > rows + 3 else ""
        raise UserError(
            f"the tokenizer has ids up to {ids - 1}, the model has vectors up to {rows - 1}: it knows nothing of "
            f"{', '.join(tokens)}{more}. Set model.resize_embeddings: true, which gives "
            "them the mean of the others to begin with, or model.processor to the model's own"
        )


def check_attention(settings: ModelSettings) -> None:
    """Raise UserError when the attention that is asked for cannot run the model, or is not installed where a GPU is.

    Others need not have it: rows are prepared, and drivers run, on CPU nodes. Workers fail where it is missing.
    """
    if settings.attention != "flash_attention_2":
        return
    if problem := flash_problem(empty_model(settings.model_copy(update={"attention": "eager"})), settings):
        raise UserError(f"model.attention is flash_attention_2, which cannot run this model: {problem}; set sdpa")
    if not torch.cuda.is_available():
        return
    if not is_flash_attn_2_available(kernels_fallback_ok=True):
        raise UserError(
            "model.attention is flash_attention_2, and neither flash_attn is installed nor the kernel that "
            f"transformers takes instead ({FLASH_ATTN_KERNEL_FALLBACK[settings.attention]}, by the package kernels of "
            f"{KERNELS_MIN_VERSION} or newer); install one of them, or set sdpa"
        )


def check_evaluation_prompt(family: Family, prompt: str) -> None:
    """Raise UserError for a prompt of evaluations that would have no effect, or would stand for pictures itself."""
    if family.has_prompt:
        raise UserError(
            "evaluation.prompt: this model is asked with what stands in its rows before the answer, as it was trained; "
            "leave it out"
        )
    media = [str(token) for token in family.tokenizer.convert_ids_to_tokens(list(family.media_token_ids))]
    if written := [token for token in media if token in prompt.replace("<image>", "")]:
        raise UserError(f"evaluation.prompt: {written[0]!r} stands for the pixels of an image; write <image> instead")


def check_packing(config: PretrainedConfig, family: Family, packing: PackingSettings, micro_batch_bins: int) -> None:
    """Raise UserError when rows of several samples would be wrong for the model: they would train all the same.

    config: `load_config` of the job's model.
    """
    if packing.mode == "none" and micro_batch_bins == 1:
        return
    problem = family.packing_problem(
        config, sample_tokens=packing.token_capacity, row_tokens=packing.token_capacity * micro_batch_bins
    )
    if problem:
        raise UserError(
            f"a {config.model_type} cannot train on packed rows: {problem}. Set packing.mode: none and "
            "training.micro_batch_bins: 1"
        )
