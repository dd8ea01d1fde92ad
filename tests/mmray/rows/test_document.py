"""From rows as users write them to text with one unit per image: both kinds, all forms, and every refusal."""

import datetime
import decimal
import posixpath
import uuid

import fsspec
import pytest
from jinja2 import TemplateError

from mmray.errors import RowError, UserError
from mmray.families import family_of
from mmray.rows.document import DocumentReader
from mmray.rows.image_refs import ImageRef
from mmray.rows.settings import DatasetSettings
from tests.mmray.preparing import chat

QWEN_UNIT = "<|vision_start|><|image_pad|><|vision_end|>"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
SOURCE = "/data/set/rows.jsonl:7"


@pytest.fixture(scope="session")
def reader(processors):
    """A function that makes a reader of one family for one set of rows."""

    def make(kind, family="qwen2_vl", **settings):
        return DocumentReader(
            DatasetSettings(files=("rows.jsonl",), kind=kind, **settings), family_of(processors[family])
        )

    return make


def error_of(reader, row, source=SOURCE):
    """The error of a row: one line."""
    with pytest.raises(RowError) as caught:
        reader.read(row, source)
    assert "\n" not in caught.value.message
    return caught.value


def user(content):
    return {"messages": [{"role": "user", "content": content}]}


# ---- Pre-training ----


def test_placeholders_become_the_familys_unit(reader):
    row = {"id": "a#1", "text": "<image>\nOne.\n\n<image> Two.", "images": ["a.jpg", "b.jpg"]}
    document = reader("pretrain").read(row, SOURCE)
    assert document.text == f"{QWEN_UNIT}\nOne.\n\n{QWEN_UNIT} Two."
    assert document.id == "a#1"
    assert document.add_special_tokens
    assert document.images == (ImageRef("/data/set/a.jpg"), ImageRef("/data/set/b.jpg"))
    assert reader("pretrain", "idefics3").read(row, SOURCE).text == row["text"]


@pytest.mark.parametrize("written", ["<image>", "<|image_pad|>", QWEN_UNIT])
def test_the_models_own_placeholder_works_too(reader, written):
    row = {"text": f"A {written} b {written}{written}", "images": ["a", "b", "c"]}
    assert reader("pretrain").read(row, SOURCE).text == f"A {QWEN_UNIT} b {QWEN_UNIT}{QWEN_UNIT}"


def test_a_set_may_have_a_placeholder_of_its_own_which_is_no_pattern(reader):
    own = reader("pretrain", placeholder="(*)")
    assert own.read({"text": "(*) x", "images": ["a"]}, SOURCE).text == f"{QWEN_UNIT} x"
    assert own.read({"text": "a <image> in HTML"}, SOURCE).text == "a <image> in HTML"


def test_rows_without_images_are_text(reader):
    for row in ({"text": "Hello"}, {"text": "Hello", "images": None}, {"text": "Hello", "images": []}):
        assert reader("pretrain").read(row, SOURCE).text == "Hello"


@pytest.mark.parametrize(("text", "images"), [("<image>", 0), ("no place", 1), ("<image> <image>", 1), ("<image>", 2)])
@pytest.mark.parametrize("kind", ["pretrain", "chat"])
def test_placeholders_and_images_must_be_as_many(reader, kind, text, images):
    fields = {"text": text} if kind == "pretrain" else user(text)
    error = error_of(reader(kind), fields | {"images": ["a.jpg"] * images})
    assert error.reason == "placeholder_count"
    ending = {0: "s", 1: "", 2: "s"}
    places = text.count("<image>")
    assert f"{places} image placeholder{ending[places]} but {images} image{ending[images]};" in error.message


@pytest.mark.parametrize("text", ["", "  \n\t "])
def test_empty_text_is_refused(reader, text):
    assert error_of(reader("pretrain"), {"text": text}).reason == "empty_text"


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|endoftext|>", "<|video_pad|>"])
def test_structure_tokens_in_text_are_refused(reader, token):
    error = error_of(reader("pretrain"), {"text": f"see {token} here"})
    assert error.reason == "special_token_in_text"
    assert repr(token) in error.message
    assert error_of(reader("chat"), user(f"see {token} here")).reason == "special_token_in_text"
    parts = [{"type": "text", "text": f"see {token} here"}]
    assert error_of(reader("chat"), user(parts)).reason == "special_token_in_text"


def test_tokens_of_other_families_are_text(reader):
    assert (
        reader("pretrain").read({"text": "<|end_of_text|> <row_1_col_1>"}, SOURCE).text
        == "<|end_of_text|> <row_1_col_1>"
    )
    error = error_of(reader("pretrain", "idefics3"), {"text": "<row_1_col_1>"})
    assert error.reason == "special_token_in_text"


# ---- Chat ----


def test_messages_of_strings_and_of_parts_are_the_same_document(reader):
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    asked, answered = {"role": "user"}, {"role": "assistant", "content": "A page."}
    rows = [
        {"messages": [asked | {"content": parts}, answered]},
        {"messages": [asked | {"content": parts}, answered | {"content": [{"type": "text", "text": "A page."}]}]},
        {"messages": [asked | {"content": "<image>What is it?"}, answered]},
        {"conversations": [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A page."}]},
    ]
    for row in rows:
        document = reader("chat").read(row | {"images": ["a.jpg"]}, SOURCE)
        assert document.text == (
            f"{SYSTEM}<|im_start|>user\n{QWEN_UNIT}What is it?<|im_end|>\n<|im_start|>assistant\nA page.<|im_end|>\n"
        )
        assert document.images == (ImageRef("/data/set/a.jpg"),)


def test_fields_that_a_parquet_file_fills_with_nothing_are_not_there(reader):
    """A struct column has every field in every row."""
    message = {"role": None, "content": None, "from": "human", "value": "Hi"}
    part = {"type": "image", "text": None, "image_url": None}
    text = reader("chat").read({"messages": None, "conversations": [message]}, SOURCE).text
    assert text == f"{SYSTEM}<|im_start|>user\nHi<|im_end|>\n"
    assert reader("chat").read(user([part]) | {"images": ["a.jpg"]}, SOURCE).text.count(QWEN_UNIT) == 1


def test_an_image_part_says_which_picture_it_is(reader):
    """Beside a column of images, too: they must say the same."""
    for part in (
        {"type": "image_url", "image_url": {"url": "a.jpg"}}, {"type": "image", "image": "a.jpg"},
        {"type": "image", "path": "a.jpg"}, {"type": "image", "url": "./a.jpg", "image": None},
        {"type": "image_url", "image_url": "a.jpg"}, {"type": "image", "image": {"path": "a.jpg", "bytes": None}},
    ):  # fmt: skip
        for row in (user([part]), user([part]) | {"images": ["a.jpg"]}):
            assert reader("chat").read(row, SOURCE).images == (ImageRef("/data/set/a.jpg"),)
        error = error_of(reader("chat"), user([part]) | {"images": ["b.jpg"]})
        assert error.reason == "image_conflict"
        assert "names '/data/set/a.jpg', and images[0] '/data/set/b.jpg'" in error.message


def test_an_index_points_into_the_images(reader):
    def parts(*numbers):
        return user([{"type": "image", "index": number, "text": None} for number in numbers])

    images = {"images": ["a.jpg", "b.jpg"]}
    found = reader("chat").read(parts(1, 0, 1) | images, SOURCE).images
    assert [image.uri[-5:] for image in found] == ["b.jpg", "a.jpg", "b.jpg"]
    assert error_of(reader("chat"), parts(0, 2) | images).reason == "image_conflict"
    assert "images[1] is the picture of no image part" in error_of(reader("chat"), parts(0) | images).message
    mixed = user([{"type": "image", "index": 0}, {"type": "image"}])
    assert "some image parts have an index" in error_of(reader("chat"), mixed | images).message


def test_a_data_uri_is_its_bytes(reader):
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
    assert reader("chat").read(user([part]), SOURCE).images == (ImageRef(data=b"hello"),)
    for url in ("data:image/png,abc", "data:image/png;base64,a*b"):
        assert error_of(reader("chat"), user([{"type": "image_url", "image_url": url}])).reason == "image_unreadable"


@pytest.mark.parametrize("alias", ["gpt", "assistant"])
def test_roles_have_their_sharegpt_names_too(reader, alias):
    row = {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "human", "content": "U"},
            {"role": alias, "content": "A"},
        ]
    }
    assert reader("chat").read(row, SOURCE).text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    )


def test_special_tokens_are_added_as_the_processor_would(reader):
    """A template that begins with the first token of every text must not get it twice."""
    assert reader("chat").read(chat("Hi", "Yes"), SOURCE).add_special_tokens
    assert not reader("chat", "smolvlm").read(chat("Hi", "Yes"), SOURCE).add_special_tokens


@pytest.mark.parametrize("role", ["narrator", "", None, 3, ["user"], {"user": 1}, "Users"])
def test_unknown_roles_are_refused_with_those_known(reader, role):
    error = error_of(reader("chat"), {"messages": [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]})
    assert error.reason == "unknown_role"
    assert "message 1" in error.message
    assert "assistant" in error.message


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ("hello", "'hello'"),
        ([], "[]"),
        ({"role": "user"}, "{'role'"),
        (["hello"], "message 0 must be an object, not str 'hello'"),
        ([{"role": "user"}], "message 0: content must be a string or a list of parts, not None"),
        ([{"role": "user", "content": 7}], "not 7"),
        ([{"role": "user", "content": ["text"]}], "not 'text'"),
        ([{"role": "user", "content": [{"type": "video"}]}], "not {'type': 'video'}"),
        ([{"role": "user", "content": [{"type": "text"}]}], "not {'type': 'text'}"),
        ([{"role": "user", "content": [{"type": "text", "text": b"bytes"}]}], "not {'type': 'text', 'text': b'bytes'}"),
        ([{"role": "user", "content": [{"type": ["text"]}]}], "not {'type': ['text']}"),
    ],
)
def test_messages_of_another_type_are_refused_and_quoted(reader, messages, found):
    error = error_of(reader("chat"), {"messages": messages})
    assert error.reason == "wrong_type"
    assert found in error.message


@pytest.mark.parametrize("text", ["<image>", "a <|image_pad|>", QWEN_UNIT])
def test_a_placeholder_typed_into_a_text_part_is_refused(reader, text):
    error = error_of(reader("chat"), user([{"type": "text", "text": text}]) | {"images": ["a.jpg"]})
    assert error.reason == "special_token_in_text"
    assert "'image'" in error.message


@pytest.mark.parametrize(
    ("first", "second"), [("<|im_", "start|>"), ("<|im_end|", ">"), ("<ima", "ge>"), ("<", "|im_end|>")]
)
@pytest.mark.parametrize("family", ["qwen2_vl", "smolvlm"])
def test_tokens_in_two_halves_are_refused(reader, family, first, second):
    """Templates write the text parts of a message one after another."""
    parts = [{"type": "text", "text": text} for text in ("see ", first, second)]
    assert error_of(reader("chat", family), user(parts)).reason == "special_token_in_text"
    parts.insert(2, {"type": "image"})
    assert reader("chat", family).read(user(parts) | {"images": ["a"]}, SOURCE).images  # apart, they are text


def test_a_template_that_refuses_a_conversation_rejects_the_row(reader, monkeypatch):
    strict = reader("chat")

    def refuse(*_, **__):
        raise TemplateError("roles must alternate")

    monkeypatch.setattr(strict.family.processor, "apply_chat_template", refuse)
    error = error_of(strict, chat("Hi", "Yes"))
    assert error.reason == "template"
    assert "roles must alternate" in error.message


def test_a_template_that_drops_images_rejects_the_row(reader, monkeypatch):
    deaf = reader("chat")
    monkeypatch.setattr(deaf.family.processor, "apply_chat_template", lambda *_, **__: "no images")
    error = error_of(deaf, chat("<image>", "Yes", images=["a.jpg"]))
    assert error.reason == "template"
    assert "wrote 0 images where the messages have 1" in error.message


# As PaddleOCR-VL's: of a string, which it goes through letter by letter, it writes nothing.
READS_PARTS = """\
{%- for message in messages -%}
{{- message['role'] + ': ' -}}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}{%- endif -%}
{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{{- '\\n' -}}
{%- endfor -%}
"""
# As GLM-4.1V's: only the user may have parts.
READS_STRINGS = READS_PARTS.replace(
    "{%- for part in message['content'] -%}",
    "{%- if message['role'] == 'assistant' or message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}",
).replace("{%- endfor -%}\n{{-", "{%- endfor -%}{%- endif -%}\n{{-")


@pytest.mark.parametrize("template", [READS_PARTS, READS_STRINGS])
def test_a_text_is_written_whatever_form_the_template_reads(reader, monkeypatch, template):
    monkeypatch.setattr(reader("chat").family.processor, "chat_template", template)
    parts = [{"type": "text", "text": text} for text in ("It is ", "a label.")]
    messages = [
        {"role": "user", "content": "<image>What is it?"},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    document = reader("chat").read({"messages": messages, "images": ["a.jpg"]}, SOURCE)
    expected = f"user: {QWEN_UNIT}What is it?\nassistant: It is a label.\nuser: Sure?\nassistant: Yes.\n"
    assert document.text == expected


def test_chat_rows_need_a_chat_template(reader, monkeypatch):
    monkeypatch.setattr(reader("chat").family.processor, "chat_template", None)
    with pytest.raises(UserError, match="no chat template"):
        reader("chat")
    assert reader("pretrain")


# ---- Fields ----


def test_columns_may_have_other_names(reader):
    own = reader("pretrain", columns={"id": "key", "text": "markdown", "images": "scans"})
    row = {"key": "k", "markdown": "<image>x", "scans": ["a.jpg"], "text": 7, "images": 7, "id": [7]}
    document = own.read(row, SOURCE)
    assert (document.id, document.text, len(document.images)) == ("k", f"{QWEN_UNIT}x", 1)
    error = error_of(own, {"text": "x"})
    assert error.reason == "missing_column"
    assert "'markdown'" in error.message
    own = reader("chat", columns={"messages": "dialogue"})
    assert "Hi" in own.read({"dialogue": [{"role": "user", "content": "Hi"}]}, SOURCE).text
    assert "no 'dialogue' and no 'conversations'" in error_of(own, {"messages": []}).message


@pytest.mark.parametrize("kind", ["pretrain", "chat"])
def test_a_row_without_its_text_is_refused_with_the_fields_it_has(reader, kind):
    error = error_of(reader(kind), {"contents": "x", "na\nme": 1} | {f"field {n}": 1 for n in range(1000)})
    assert error.reason == "missing_column"
    assert "'contents', 'na\\nme'" in error.message
    assert len(error.message) < 400


@pytest.mark.parametrize("value", [7, b"bytes", ["list"], {"a": 1}, True])
def test_text_of_another_type_is_refused_and_quoted(reader, value):
    error = error_of(reader("pretrain"), {"text": value})
    assert error.reason == "wrong_type"
    assert f"{type(value).__name__} {value!r}" in error.message


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", "a"),
        (12, "12"),
        (0, "0"),
        (1.5, "1.5"),
        (12.0, "12.0"),
        (None, SOURCE),
        (float("nan"), SOURCE),
        (b"a7", "a7"),
        (b"\xff\x00", "ff00"),
        (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        (datetime.datetime(2024, 5, 6, 7), "2024-05-06T07:00:00"),
        (datetime.date(2024, 5, 6), "2024-05-06"),
        (decimal.Decimal("1.50"), "1.50"),
    ],
)
def test_ids_are_strings_or_numbers_else_the_place(reader, value, expected):
    assert reader("pretrain").read({"id": value, "text": "x"}, SOURCE).id == expected


@pytest.mark.parametrize("value", [True, ["a"], {"a": 1}])
def test_ids_of_another_type_are_refused(reader, value):
    error = error_of(reader("pretrain"), {"id": value, "text": "x"})
    assert error.reason == "wrong_type"
    assert repr(value) in error.message


# ---- Images ----


def place(reader, entry, source=SOURCE):
    return reader.read({"text": "<image>", "images": [entry]}, source).images[0].uri


def test_images_are_looked_for_beside_the_row_file(reader):
    assert place(reader("pretrain"), "pages/a.jpg") == "/data/set/pages/a.jpg"
    assert place(reader("pretrain"), "a.jpg", "rows.jsonl:1") == "a.jpg"
    assert place(reader("pretrain"), "a.jpg", "s3://bucket/set/rows.jsonl:1") == "s3://bucket/set/a.jpg"
    assert place(reader("pretrain"), "a.jpg", "s3://bucket/rows.jsonl:1") == "s3://bucket/a.jpg"


@pytest.mark.parametrize("name", ["memory://rows.jsonl", "memory:///rows.jsonl", "memory://deep/er/rows.jsonl"])
def test_the_place_of_an_image_beside_a_row_file_in_memory_opens(reader, name):
    folder = name.removesuffix("rows.jsonl")
    with fsspec.open(f"{folder}a.jpg", "wb") as file:
        file.write(b"pixels")
    with fsspec.open(place(reader("pretrain"), "a.jpg", f"{name}:1"), "rb") as file:
        assert file.read() == b"pixels"


@pytest.mark.parametrize(
    ("root", "entry", "expected"),
    [
        ("/pages", "a.jpg", "/pages/a.jpg"),
        ("/pages/", "b/../a.jpg", "/pages/a.jpg"),
        ("/pages", "/pages/a.jpg", "/pages/a.jpg"),
        ("/", "/pages/a.jpg", "/pages/a.jpg"),
        ("/", "a.jpg", "/a.jpg"),
        ("pages", "a.jpg", "pages/a.jpg"),
        (".", "a.jpg", "a.jpg"),
        ("..", "a.jpg", "../a.jpg"),
        ("../x/../pages", "..a.jpg", "../pages/..a.jpg"),
        ("s3://bucket/x", "y/a.jpg", "s3://bucket/x/y/a.jpg"),
        ("s3://bucket", "a.jpg", "s3://bucket/a.jpg"),
        ("memory://", "a.jpg", "memory://a.jpg"),
        ("/pages", "s3://elsewhere/a.jpg", "s3://elsewhere/a.jpg"),
        ("/pages", "C:\\a.jpg", "/pages/C:\\a.jpg"),
    ],
)
def test_paths_are_relative_to_the_image_root(reader, root, entry, expected):
    assert place(reader("pretrain", image_root=root), entry) == expected


@pytest.mark.parametrize(
    "root", ["/pages", "/pages/", "pages", "./pages", ".", "..", "s3://bucket/pages", "memory://pages"]
)
@pytest.mark.parametrize(
    "entry", ["../a.jpg", "..", "x/../../a.jpg", "../pages2/a.jpg", "/etc/passwd", "/", "../../etc/passwd"]
)
def test_paths_out_of_the_image_root_are_refused(reader, root, entry):
    error = error_of(reader("pretrain", image_root=root), {"text": "<image>", "images": [entry]})
    assert error.reason == "image_outside_root"
    assert repr(entry) in error.message
    assert repr(root) in error.message
    error = error_of(reader("pretrain"), {"text": "<image>", "images": [entry]})
    assert "'/data/set'" in error.message


def test_an_absolute_path_inside_a_relative_root_is_inside(reader):
    inside = posixpath.abspath("pages/a.jpg")
    assert place(reader("pretrain", image_root="pages"), inside) == inside


def test_images_may_be_bytes_or_the_structs_of_hugging_face(reader):
    entries = [
        b"\xff\xd8",
        {"bytes": b"\xff\xd8", "path": "a.jpg"},
        {"bytes": None, "path": "a.jpg"},
        {"path": "b.jpg"},
    ]
    images = reader("pretrain").read({"text": "<image>" * 4, "images": entries}, SOURCE).images
    paths = [ImageRef("/data/set/a.jpg"), ImageRef("/data/set/b.jpg")]
    assert list(images) == [ImageRef(data=b"\xff\xd8")] * 2 + paths


@pytest.mark.parametrize("entry", [None, "", 7, [], {}, {"path": ""}, {"bytes": None, "path": None}, {"path": 7}])
def test_images_of_another_type_are_refused_and_quoted(reader, entry):
    error = error_of(reader("pretrain"), {"text": "<image>", "images": [entry]})
    assert error.reason == "wrong_type"
    assert "a path, a URI or bytes" in error.message


@pytest.mark.parametrize("images", [7, True])
def test_images_that_are_no_list_are_refused(reader, images):
    error = error_of(reader("pretrain"), {"text": "<image>", "images": images})
    assert error.reason == "wrong_type"
    assert "images must be a list" in error.message
