"""The written folders are processors: transformers loads them, they encode any text, pictures stay small."""

import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Idefics3Processor

from mmray.synthetic.documents import make_document
from mmray.synthetic.pages import _oversize
from mmray.synthetic.processors import MODEL_TYPES, write_processor

MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the total?"}]},
    {"role": "assistant", "content": "12.50"},
]
RENDERED = {
    "qwen2_vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is the total?<|im_end|>\n"
    "<|im_start|>assistant\n12.50<|im_end|>\n",
    "idefics3": "<|start_of_role|>user<|end_of_role|><image>What is the total?<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>12.50<|end_of_text|>\n",
    "smolvlm": "<|im_start|>User:<image>What is the total?<end_of_utterance>\nAssistant: 12.50<end_of_utterance>\n",
}
RENDERED["qwen2_5_vl"] = RENDERED["qwen2_vl"]


@pytest.fixture(params=MODEL_TYPES)
def model_type(request) -> str:
    return request.param


@pytest.fixture
def folder(model_type, tmp_path):
    return write_processor(tmp_path, model_type)


def test_tokenizer_encodes_any_text_and_back(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in (make_document(0, 0).text, "naïve 漢字 \t\n\n  <b>☃</b>", ""):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer("", add_special_tokens=True)["input_ids"] == []


def test_vocabulary_is_small_and_texts_are_short_in_it(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert 500 < len(tokenizer) < 700
    text = make_document(9, 0).text
    assert len(tokenizer(text)["input_ids"]) < len(text) / 2
    assert tokenizer.tokenize("1290") == ["1", "2", "9", "0"]


def test_special_tokens_are_single_tokens(folder, model_type):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = {
        "qwen": [
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            "<|vision_start|>",
            "<|image_pad|>",
            "<|video_pad|>",
        ],
        "idef": ["<fake_token_around_image>", "<image>", "<global-img>", "<row_6_col_6>", "<|end_of_role|>"],
        "smol": [
            "<fake_token_around_image>",
            "<image>",
            "<global-img>",
            "<row_1_col_1>",
            "<end_of_utterance>",
        ],
    }[model_type[:4]]
    ids = tokenizer("".join(expected))["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert set(ids) <= set(tokenizer.all_special_ids)
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id is not None


def test_chat_template(folder, model_type):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert rendered == RENDERED[model_type]
    prompt = tokenizer.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith(prompt)


def test_a_page_is_about_a_hundred_visual_tokens_at_most(folder, model_type):
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    outputs = images(Image.new("RGB", (336, 448), "white"), return_tensors="np")
    if model_type.startswith("qwen"):
        assert 50 < outputs["image_grid_thw"].prod() // 4 <= 96
    else:
        assert outputs["pixel_values"].shape == (1, 5, 3, 64, 64)  # 2 x 2 tiles and the overview


def test_idefics3_processor_of_transformers_takes_the_folder(tmp_path):
    folder = write_processor(tmp_path, "idefics3")
    processor = Idefics3Processor(
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
        AutoTokenizer.from_pretrained(folder),
        image_seq_len=4,
    )
    vocabulary = len(processor.tokenizer)
    ids = processor(text="<image>\nTotal", images=[Image.new("RGB", (300, 448), "white")])["input_ids"][0]
    assert ids.count(processor.image_token_id) == 5 * 4
    assert len(processor.tokenizer) == vocabulary == len(AutoTokenizer.from_pretrained(folder))


def test_own_texts_and_the_same_folder_for_the_same_texts(tmp_path):
    texts = ["zebra crossing"] * 10
    first, again = (write_processor(tmp_path / name, "qwen2_vl", texts) for name in "ab")
    assert AutoTokenizer.from_pretrained(first).tokenize("zebra crossing") == ["zebra", "Ġcrossing"]
    names = sorted(path.name for path in first.iterdir())
    assert names == [
        "chat_template.jinja",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_unknown_family(tmp_path):
    with pytest.raises(ValueError, match="must be one of qwen2_vl, qwen2_5_vl, idefics3, smolvlm, got 'llava'"):
        write_processor(tmp_path, "llava")


def test_oversize_rows_are_oversize(tmp_path):
    """pages.py promises more than 30,000 tokens; checked with the tokenizer that the demo uses."""
    tokenizer = AutoTokenizer.from_pretrained(write_processor(tmp_path), model_max_length=10**9)
    assert len(tokenizer(_oversize(0))["input_ids"]) > 30_000
