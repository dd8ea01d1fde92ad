"""Loading processors: without torchvision, always with a PIL image processor, and what is said when there is none."""

import copy
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from transformers import AutoProcessor

from mmray.errors import UserError
from mmray.families import family_of, load_processor
from mmray.families.idefics3 import Idefics3
from mmray.families.qwen2_vl import Qwen2VL
from mmray.synthetic.processors import MODEL_TYPES

CLASSES = {
    "qwen2_vl": ("Qwen2VLProcessor", Qwen2VL),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", Qwen2VL),
    "idefics3": ("Idefics3Processor", Idefics3),
    "smolvlm": ("SmolVLMProcessor", Idefics3),
    "qwen2-vl": ("Qwen2VLProcessor", Qwen2VL),
    "granite-docling": ("Idefics3Processor", Idefics3),
}


def check_loaded(processor, name):
    class_name, family_class = CLASSES[name]
    assert type(processor).__name__ == class_name
    assert processor.image_processor.backend == "pil"
    assert type(family_of(processor)) is family_class
    output = processor(text=[family_of(processor).placeholder_unit], images=[page()])
    assert output["input_ids"][0].count(family_of(processor).image_token_id) > 0


def page():
    return Image.new("RGB", (120, 90), (200, 100, 50))


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_small_processors(processors, name):
    check_loaded(processors[name], name)


def test_shared_processors(shared_processor, request):
    check_loaded(shared_processor, request.node.callspec.params["shared_processor"])


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is here")
def test_without_torchvision_there_is_no_video_part(processor):
    assert getattr(processor, "video_processor", None) is None


def test_with_torchvision_the_image_processor_is_the_pil_one_all_the_same(processor_folders, processors, monkeypatch):
    """The two resample differently; a run must not depend on what is installed."""
    theirs = copy.copy(processors["qwen2_vl"])
    theirs.image_processor = None
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: json.__spec__)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: theirs)
    assert load_processor(processor_folders["qwen2_vl"]) is theirs
    assert theirs.image_processor.backend == "pil"


def test_chat_templates_work_without_a_video_processor(processor):
    text = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    rendered = processor.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    assert rendered.count(family_of(processor).placeholder_unit) == 1
    assert "What is this?" in rendered


def test_a_folder_named_by_its_model_type_alone(processor_folders, tmp_path):
    """Published folders may name no processor class; the model's config then tells."""
    source = processor_folders["qwen2_vl"]
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        settings = json.loads((source / name).read_text())
        settings.pop("processor_class", None)
        (tmp_path / name).write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    assert type(load_processor(tmp_path)).__name__ == "Qwen2VLProcessor"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder"),
        ({}, "no processor could be loaded"),
        ({"processor_config.json": '{"processor_class": "NoSuchProcessor"}'}, "NoSuchProcessor"),
        ({"processor_config.json": "{"}, "no processor could be loaded"),
        ({"processor_config.json": '{"processor_class": "PixtralProcessor"}'}, "PixtralProcessor|file"),
    ],
)
def test_what_is_no_processor(tmp_path: Path, files, message):
    folder = tmp_path / "processor"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_processor(folder)
    assert str(folder) in str(caught.value)


def test_a_model_that_is_not_the_processor_s(processors):
    with pytest.raises(UserError, match=r"the model is a idefics3, but Qwen2VLProcessor is a processor of qwen2_vl"):
        family_of(processors["qwen2_vl"], model_type="idefics3")


def test_a_tokenizer_without_the_family_s_tokens(processors):
    qwen, idefics = processors["qwen2_vl"], processors["idefics3"]

    class Qwen2VLProcessor(SimpleNamespace):
        pass

    mixed = Qwen2VLProcessor(tokenizer=idefics.tokenizer, image_processor=qwen.image_processor)
    with pytest.raises(ValueError, match=r"no token '<\|image_pad\|>'"):
        family_of(mixed)
