"""Loading processors so that the same page gives the same tokens and pixels on every machine.

Image processors are taken in their PIL form always, with or without torchvision: the two forms resample differently,
and a run must not depend on which packages a node has. Where torchvision is absent, processors that also want a video
processor are built without one; mmray reads no video. A few models have no PIL image processor: these need torchvision.
"""

import functools
import importlib
import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoImageProcessor, AutoProcessor, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils.hub import cached_files

from mmray.errors import UserError
from mmray.families.model_source import source_problem

log = logging.getLogger("mmray")

_CONFIG_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "config.json")


@functools.cache
def warn_of_remote_code(name: str) -> None:
    """Warns, once for each source in a process, that code from there may run."""
    log.warning(
        "WARNING: trust_remote_code is ON: Python code that comes with %s runs here, with all your rights, files and "
        "credentials. Leave it off unless you have read that code",
        name,
    )


def load_processor(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The processor of a folder or hub name, with a PIL image processor, with or without torchvision.

    Raises UserError when the folder holds no processor, or one whose class transformers does not know.
    """
    name = str(path)
    if trust_remote_code:
        warn_of_remote_code(name)
    if problem := source_problem(name):
        raise UserError(f"no processor could be loaded from {name!r}: {problem}")
    try:
        if importlib.util.find_spec("torchvision") is not None:
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
        else:
            cls = _unguarded(_processor_class(name))
            without = {"video_processor": None} if "video_processor" in cls.get_attributes() else {}
            processor = _image_only(cls).from_pretrained(name, trust_remote_code=trust_remote_code, **without)
        processor.image_processor = AutoImageProcessor.from_pretrained(
            name, backend="pil", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:  # ImportError: a class that needs torchvision
        raise UserError(f"no processor could be loaded from {name!r}: {error}") from error
    return processor


def _processor_class(name: str) -> Any:
    """The class that the folder's files name; otherwise the one that transformers maps the model type to."""
    files = cached_files(name, list(_CONFIG_FILES), _raise_exceptions_for_missing_entries=False)
    for file in map(Path, files or ()):
        settings = json.loads(file.read_text(encoding="utf-8"))
        class_name = settings.get("processor_class") or PROCESSOR_MAPPING_NAMES.get(settings.get("model_type"))
        if class_name:
            loaded = getattr(transformers, class_name, None)
            if loaded is None:
                raise ValueError(
                    f"{file.name} names the processor class {class_name!r}, which transformers does not have"
                )
            return loaded
    raise ValueError(f"none of {', '.join(_CONFIG_FILES)} names a processor class")


@functools.cache
def _unguarded(cls: Any) -> Any:
    """The real class where transformers has put a stand-in that only says that torchvision is missing.

    Such a processor's module imports functions from the image processor for torchvision, as Pixtral's does. The PIL
    image processor's module has the same functions: while the processor's module loads, it stands for the other one.
    """
    package, _, name = cls.__module__.rpartition(".processing_")
    pil = f"{package}.image_processing_pil_{name}"
    if not getattr(cls, "is_dummy", False) or importlib.util.find_spec(pil) is None:
        return cls
    guarded = f"{package}.image_processing_{name}"
    sys.modules[guarded] = importlib.import_module(pil)
    try:
        return getattr(importlib.import_module(cls.__module__), cls.__name__)
    finally:
        del sys.modules[guarded]


@functools.cache
def _image_only(cls: Any) -> Any:
    """The class without its video part: transformers loads and checks the parts that `get_attributes` lists.

    SmolVLM's own `apply_chat_template` asks its video processor for frame rates; the common one does not.
    """

    def get_attributes(_: Any) -> list[str]:
        return [part for part in cls.get_attributes() if part != "video_processor"]

    changes = {"get_attributes": classmethod(get_attributes), "apply_chat_template": ProcessorMixin.apply_chat_template}
    return type(cls.__name__, (cls, _WithoutVideo), changes)


class _WithoutVideo(ProcessorMixin):
    """A class between a processor's class and the common one, to which some pass a `video_processor` by name."""

    def __init__(self, *args: Any, video_processor: None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
