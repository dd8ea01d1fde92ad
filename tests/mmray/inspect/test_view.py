"""A bin shown to a person: what is shown as trained is what trains, every token once, nothing taken for markup."""

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mmray.base.visible import visible
from mmray.errors import UserError
from mmray.inspect import print_bin
from mmray.inspect.terminal import turn_text
from mmray.inspect.text import token_texts
from mmray.inspect.view import Mark, Piece, Turn, family_of_prepared, view_bin
from mmray.loss.rules import IGNORE_INDEX
from mmray.loss.settings import BoundarySettings, RoleLoss
from tests.mmray.looking import ODD, name_processor, preparation, training_labels, write_looked_at
from tests.mmray.preparing import with_marked_template


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_looked_at(tmp_path_factory.mktemp("inspect [x]"))


@pytest.fixture
def viewed(processors, folder, tmp_path):
    """A function that prepares rows: the view of the first bin, the dataset, the preparation."""

    def viewed(family, *kinds, processor=None, **options):
        made = preparation(processor or processors[family], folder, *kinds, **options)
        prepared = made.write(tmp_path / f"prepared-{len(list(tmp_path.iterdir()))}")
        return view_bin(prepared, 0, made.family), prepared, made

    return viewed


@pytest.fixture
def shown(processors, processor_folders, folder, tmp_path):
    """A function that prepares rows and gives what is printed of the first bin."""

    def shown(family, *kinds, source=None, color=False, width=300, **options):
        prepared = preparation(processors[family], folder, *kinds, **options).write(tmp_path / "-".join(kinds))
        file = io.StringIO()
        console = Console(file=file, width=width, force_terminal=color, color_system="standard" if color else None)
        print_bin(console, prepared, 0, str(source or processor_folders[family]))
        return file.getvalue()

    return shown


def pieces_of(view):
    """(place in the bin, piece) of all samples."""
    return [
        (sample.start + piece.start, piece) for sample in view.samples for turn in sample.turns for piece in turn.pieces
    ]


def text_of(pieces):
    return "".join(piece.text * (len(piece.token_ids) if piece.is_run else 1) for piece in pieces)


def turns_of(sample):
    return [(turn.role, text_of(turn.pieces)) for turn in sample.turns]


# ---- Text of tokens ----


@given(st.text(max_size=40))
def test_the_texts_of_tokens_joined_are_the_text(processors, text):
    tokenizer = processors["qwen2_vl"].tokenizer
    ids = tokenizer(text)["input_ids"]
    pieces = token_texts(ids, tokenizer.decode)
    assert sum(count for count, _ in pieces) == len(ids)
    assert "".join(piece for _, piece in pieces) == tokenizer.decode(ids)


@given(st.lists(st.integers(0, 400), max_size=30))
def test_any_tokens_are_shown_once(processors, ids):
    """Bytes that make no character, too, as rows of ready-made ids may hold."""
    pieces = token_texts(ids, processors["qwen2_vl"].tokenizer.decode)
    assert sum(count for count, _ in pieces) == len(ids)
    assert all(1 <= count <= 4 for count, _ in pieces)


def test_tokens_that_make_one_character_are_one_piece(processors):
    tokenizer = processors["qwen2_vl"].tokenizer
    ids = tokenizer("a\N{GRINNING FACE}b")["input_ids"]
    assert token_texts(ids, tokenizer.decode) == [(1, "a"), (len(ids) - 2, "\N{GRINNING FACE}"), (1, "b")]
    assert len(ids) > 3


def test_the_space_that_a_token_begins_with_is_kept():
    """Tokenizers in the manner of SentencePiece drop it from the first token that they decode."""
    words = {"<unk>": 0, "▁one": 1, "▁two": 2, "s": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert tokenizer.decode([2]) == "two"
    assert token_texts([1, 2, 3, 2], tokenizer.decode) == [(1, "one"), (1, " two"), (1, "s"), (1, " two")]
    assert token_texts([2, 3], tokenizer.decode, before=[1]) == [(1, " two"), (1, "s")]


def test_what_acts_on_a_terminal_or_reorders_text_is_made_visible():
    assert visible("a\tb\nc") == "a\tb↵\nc"
    assert visible("\x1b[31m\x07\r\x00\x7f") == "␛[31m␇␍␀␡"
    assert visible("\x9b\u202e\u2066\ufeff\u2028") == "⟨U+009B⟩⟨U+202E⟩⟨U+2066⟩⟨U+FEFF⟩⟨U+2028⟩"
    assert visible("日本 ⟦é⟧ \u200d") == "日本 ⟦é⟧ \u200d"


# ---- What is shown is what trains ----

BOUNDARIES = (BoundarySettings(role="asked", start="What", end="?"), BoundarySettings(role="page", start="A", end="."))
LOSSES = {
    "sampled": "sampled",
    "all": "all",
    "roles": RoleLoss(roles=("user",), train_on_eos="all"),
    "last": RoleLoss(train_on_eos="last"),
    "boundaries": RoleLoss(roles=("page",), boundaries=BOUNDARIES, allow_empty=True),
    "inputs": RoleLoss(train_on_inputs=True),
}


MARKERS = {
    "qwen2_vl": ("<|im_start|>assistant\n", "<|im_end|>"),
    "idefics3": ("<|start_of_role|>assistant<|end_of_role|>", "<|end_of_text|>"),
    "smolvlm": ("Assistant:", "<end_of_utterance>"),
}
"""How the assistant's turns begin and end."""


def loss_of(name, family):
    """One of LOSSES; the boundaries of its own are those of the family's template."""
    if name != "boundaries":
        return LOSSES[name]
    start, end = MARKERS[family]
    return RoleLoss(roles=("page",), boundaries=(BoundarySettings(role="page", start=start, end=end),))


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics3", "smolvlm"])
@pytest.mark.parametrize("loss", LOSSES)
def test_trained_tokens_are_those_of_training(viewed, family, loss):
    view, prepared, made = viewed(family, "chat", "pretrain", loss=loss_of(loss, family))
    labels, packed = training_labels(prepared, 0, made), prepared.bin(0)
    found = np.full(len(labels), IGNORE_INDEX)
    place = 0
    for start, piece in pieces_of(view):
        assert start == place  # every token once, in order
        place += len(piece.token_ids)
        assert packed.input_ids[start:place].tolist() == list(piece.token_ids)
        if piece.mark is Mark.TRAINED:
            found[start:place] = piece.token_ids
    assert place == len(labels)
    assert found.tolist() == labels.tolist()
    assert (labels != IGNORE_INDEX).any()
    assert [sample.trained for sample in view.samples] == [
        int((part != IGNORE_INDEX).sum()) for part in np.split(labels, packed.sample_lengths.cumsum()[:-1])
    ]
    assert view.problem is None


def test_what_the_template_generates_is_shown_as_trained(viewed, processors):
    view, prepared, made = viewed("qwen2_vl", "chat", processor=with_marked_template(processors["qwen2_vl"]))
    assert {sample.rule for sample in view.samples} == {"given"}
    trained = [piece for _, piece in pieces_of(view) if piece.mark is Mark.TRAINED]
    assert text_of(trained) == f"A page.<|im_end|>Yes, 日本 \N{GRINNING FACE}.<|im_end|>{ODD}<|im_end|>"
    labels = training_labels(prepared, 0, made)
    assert [token for piece in trained for token in piece.token_ids] == labels[labels != IGNORE_INDEX].tolist()


def test_a_character_that_trains_in_part_is_shown_token_by_token(viewed, processors):
    ids = processors["qwen2_vl"].tokenizer("a\N{GRINNING FACE}b")["input_ids"]
    labels = [IGNORE_INDEX] * (len(ids) - 2) + ids[-2:]
    view, *_ = viewed("qwen2_vl", "tokenized", rows=[{"input_ids": ids, "labels": labels}])
    shown = [(piece.token_ids, piece.mark) for _, piece in pieces_of(view)]
    marks = [Mark.CONTEXT] * (len(ids) - 2) + [Mark.TRAINED] * 2
    assert shown == [((token,), mark) for token, mark in zip(ids, marks)]


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics3"])
def test_media_are_the_images_tokens_labels_included(viewed, family):
    tiling = {"grid": (1, 2), "tile_size": (56, 56), "labels": True}
    view, prepared, made = viewed(family, "chat", "pretrain", tiling=tiling)
    expected = np.isin(prepared.bin(0).input_ids, made.family.media_token_ids)
    for image in prepared.bin(0).images:
        expected[image["first_token"] : image["first_token"] + image["num_tokens"]] = True
    found = [piece.mark is Mark.MEDIA for _, piece in pieces_of(view) for _ in piece.token_ids]
    assert found == expected.tolist()
    media = text_of(piece for _, piece in pieces_of(view) if piece.mark is Mark.MEDIA)
    assert media.count("<row2_col1>\n") == 3


def test_runs_of_a_media_token_are_one_piece(viewed):
    view, _, made = viewed("qwen2_vl", "chat")
    runs = [piece for _, piece in pieces_of(view) if piece.is_run]
    assert [run.label for run in runs] == ["[48 × <|image_pad|>]"]
    assert runs[0].token_ids == (made.family.image_token_id,) * 48


# ---- Roles ----

ENDS = {"qwen2_vl": "<|im_end|>", "idefics3": "<|end_of_text|>", "smolvlm": "<end_of_utterance>"}


@pytest.mark.parametrize("family", ENDS)
@pytest.mark.parametrize("loss", ["sampled", "all", RoleLoss(roles=("user",), train_on_eos="none")])
def test_turns_of_every_role_whatever_trains(viewed, family, loss):
    view, _, _ = viewed(family, "chat", loss=loss)
    turns, end = turns_of(view.samples[0]), ENDS[family]
    roles = ["user", "assistant"] * 2
    assert [role for role, _ in turns if role in roles] == roles
    assert view.roles == ("system", "user", "assistant", "tool")
    texts = [text for role, text in turns if role == "assistant"]
    assert texts[0].endswith(f"A page.{end}\n")  # with the template's line break, which belongs to no role
    assert texts[1].endswith(f"Yes, 日本 \N{GRINNING FACE}.{end}\n")


def test_two_turns_of_one_role_are_two(viewed):
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "user", "assistant")]
    view, *_ = viewed("qwen2_vl", "chat", rows=[{"messages": messages}])
    assert turns_of(view.samples[0]) == [
        (role, f"<|im_start|>{role}\n{role[0]}<|im_end|>\n") for role in ("system", "user", "user", "assistant")
    ]


def test_turns_that_nothing_stands_between_are_two(viewed, processors):
    texts = ["<|im_start|>user\nOne<|im_end|>", "<|im_start|>user\n<|im_end|>", "<|im_start|>assistant\nTwo<|im_end|>"]
    ids = processors["qwen2_vl"].tokenizer("".join(texts))["input_ids"]
    view, *_ = viewed("qwen2_vl", "tokenized", rows=[{"input_ids": ids, "labels": ids}])
    assert turns_of(view.samples[0]) == list(zip(("user", "user", "assistant"), texts))


def test_turns_are_found_by_the_boundaries_of_the_job(viewed, processors):
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A page."}]
    text = processors["qwen2_vl"].apply_chat_template(messages, tokenize=False)
    ids = processors["qwen2_vl"].tokenizer(text)["input_ids"]
    view, *_ = viewed("qwen2_vl", "tokenized", rows=[{"input_ids": ids}], loss=LOSSES["boundaries"])
    assert view.roles == ("asked", "page")
    turns = turns_of(view.samples[0])
    assert [turn for turn in turns if turn[0]] == [("asked", "What is it?"), ("page", "A page.")]
    assert turns[0][1].startswith("<|im_start|>system")
    assert turns[2] == (None, "<|im_end|>\n<|im_start|>assistant\n")


def test_a_turn_without_an_end_stops_with_its_sample(viewed, processors):
    encode = processors["qwen2_vl"].tokenizer
    texts = ["<|im_start|>user\nWho", "is it?<|im_end|>", "<|im_start|>assistant\nMe<|im_end|>"]
    rows = [{"input_ids": (ids := encode(text)["input_ids"]), "labels": ids} for text in texts]
    view, *_ = viewed("qwen2_vl", "tokenized", rows=rows)
    assert [turns_of(sample) for sample in view.samples] == [
        [("user", texts[0])], [(None, texts[1])], [("assistant", texts[2])]
    ]  # fmt: skip


def test_a_document_has_no_turns(viewed):
    """In SmolVLM's template `User:` opens a turn; in a document it is text. Where chats train whole too, the prepared
    dataset no longer tells which is which."""
    view, *_ = viewed("smolvlm", "pretrain")
    assert [role for role, _ in turns_of(view.samples[0])] == [None]
    view, *_ = viewed("smolvlm", "pretrain", loss="all")
    assert [role for role, _ in turns_of(view.samples[0])] == [None, "user"]


def test_a_bin_at_which_training_would_stop_says_so(viewed):
    view, *_ = viewed("qwen2_vl", "chat")
    trained = view.trained_tokens
    problem = replace(view, trained_tokens=trained + 1).problem
    assert problem.startswith(f"{trained} tokens are trained on, {trained + 1} were counted")


# ---- In the terminal ----


def test_a_bin_has_counts_and_a_row_for_each_sample(shown, viewed, folder):
    view, *_ = viewed("qwen2_vl", "chat", "pretrain")
    head, table, *samples = shown("qwen2_vl", "chat", "pretrain").split("\n\n")
    tokens, trained = view.num_tokens, view.trained_tokens
    assert [" ".join(line.split()) for line in head.splitlines()] == [
        "bin 0 of 1 bucket mixed",
        f"tokens {tokens} of 900 ({tokens / 900:.1%})",
        f"visual 60 of 600 ({60 / 600:.1%})",
        f"trained {trained} of {tokens} ({trained / tokens:.1%})",
        "loss sampled (by messages, all)",
        "legend ⟦trained⟧ not trained [n × media] ↵ line break",
    ]
    titles, *rows = [line.split() for line in table.splitlines()]
    assert titles == ["sample", "tokens", "of", "images", "trained", "loss", "on", "id"]
    assert rows == [
        [str(number), *(str(count) for count in (sample.num_tokens, sample.image_tokens, sample.trained)), rule, name]
        for number, (sample, rule, name) in enumerate(
            zip(view.samples, ("given", "given", "all"), ("turns", "[red]odd[/]␛[1m", "page"))
        )
    ]
    assert len(samples) == 3
    title, *lines = samples[2].splitlines()
    assert title.startswith("sample 2 of 3: page ──")
    assert lines[:3] == [
        f"from {folder}/pretrain.jsonl:1", *(f"image {n}: {folder}/small.png (40 x 60)" for n in (0, 1))
    ]  # fmt: skip


def test_turns_stand_under_one_another_with_their_roles_in_the_margin(shown):
    _, _, sample, _ = shown("qwen2_vl", "chat").split("\n\n")
    assert [line.rstrip() for line in sample.splitlines()[3:]] == [
        "system     <|im_start|>system↵",
        "           You are a helpful assistant.<|im_end|>↵",
        "user       <|im_start|>user↵",
        "           <|vision_start|>[48 × <|image_pad|>]<|vision_end|>What is it?<|im_end|>↵",
        "assistant  <|im_start|>assistant↵",
        "           ⟦A page.<|im_end|>⟧↵",
        "user       <|im_start|>user↵",
        "           Sure?<|im_end|>↵",
        "assistant  <|im_start|>assistant↵",
        "           ⟦Yes, 日本 \N{GRINNING FACE}.<|im_end|>⟧↵",
    ]


def test_narrow_terminals_fold_the_text(shown):
    output = shown("qwen2_vl", "chat", "pretrain", width=40)
    _, text = output.split("sample 0 of 3")
    lines = text.splitlines()[1:]
    assert max(len(line) for line in lines if not line.startswith(("from", "image"))) <= 40
    assert "assistant  <|im_start|>assistant↵" in text


def test_media_of_the_tiled_families_is_shown_row_by_row(shown):
    output = shown("idefics3", "pretrain")
    cell = "<fake_token_around_image><row_1_col_{}>[4 × <image>]"
    assert f"{cell.format(1)}{cell.format(2)}↵" in output
    assert "<global-img>[4 × <image>]<fake_token_around_image>⟦↵" in output


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}])
def test_colours_where_there_are_some_and_brackets_where_not(shown, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    output = shown("qwen2_vl", "chat", color=True)
    green, dim, magenta, end = "\x1b[32m", "\x1b[2m", "\x1b[35m", "\x1b[0m"
    if environment:
        assert "⟦A page.<|im_end|>⟧" in output
        assert not any(colour in output for colour in (green, magenta))
        return
    assert "⟦" not in output
    assert f"{green}A page.<|im_end|>{end}" in output
    assert f"{dim}What is it?<|im_end|>↵{end}" in output
    assert f"{magenta}<|vision_start|>[48 × <|image_pad|>]<|vision_end|>{end}" in output
    assert f"{green}trained{end}" in output  # the legend
    roles = ["\x1b[1;33msystem", "\x1b[1;34muser", "\x1b[1;36massistant"]
    assert [output.count(role) for role in roles] == [2, 3, 3]


def turn(*pieces):
    return Turn(None, tuple(Piece(0, (1,), text, mark) for text, mark in pieces))


def test_brackets_of_the_text_itself_are_no_marks():
    text = turn(("a⟦b", Mark.CONTEXT), ("c⟧d\n", Mark.TRAINED), ("⟦", Mark.MEDIA))
    assert turn_text(text, plain=True).plain == "a\\u27e6b⟦c\\u27e7d↵⟧\n\\u27e6"
    assert turn_text(text, plain=False).plain == "a⟦bc⟧d↵\n⟦"


def test_nothing_of_the_data_is_markup_or_reaches_the_terminal_as_control(shown):
    output = shown("qwen2_vl", "chat")
    assert "[bold red]not[/] [/markup] ␛[31m ⟨U+009B⟩ ␇" in output
    assert "[red]odd[/]␛[1m" in output
    assert not {"\x1b", "\x07", "\x9b"}.intersection(output)


# ---- Which processor ----


def test_the_processor_of_the_manifest_is_the_default(processors, processor_folders, folder, tmp_path):
    prepared = preparation(processors["qwen2_vl"], folder, "chat").write(tmp_path)
    file = io.StringIO()
    print_bin(Console(file=file, width=200), prepared, 0)
    assert "[48 ×" not in file.getvalue()
    assert "turns" in file.getvalue()
    assert "counts only: the dataset does not name its processor" in file.getvalue()
    file = io.StringIO()
    print_bin(Console(file=file, width=200), name_processor(prepared, processor_folders["qwen2_vl"]), 0)
    assert "[48 ×" in file.getvalue()
    assert "counts only" not in file.getvalue()


def test_the_family_is_that_of_the_model_and_its_tiling(processors, processor_folders, folder, tmp_path):
    tiling = {"grid": (1, 2), "tile_size": (56, 56)}
    prepared = preparation(processors["qwen2_vl"], folder, "chat", tiling=tiling).write(tmp_path)
    source = processor_folders["qwen2_vl"]
    family = family_of_prepared(name_processor(prepared, source, "qwen2_5_vl"))
    assert family.tiled
    with pytest.raises(UserError, match="the model is a idefics3, but Qwen2VLProcessor"):
        family_of_prepared(name_processor(prepared, source, "idefics3"))


def test_a_processor_that_is_gone_or_another_one_is_refused(processors, processor_folders, folder, tmp_path):
    prepared = preparation(processors["qwen2_vl"], folder, "pretrain").write(tmp_path / "prepared")
    console = Console(file=io.StringIO())
    other = str(processor_folders["idefics3"])
    with pytest.raises(UserError, match=r"is not the processor that .* was prepared with: .*Idefics3Processor"):
        print_bin(console, prepared, 0, other)
    with pytest.raises(UserError, match=r"is not the processor that .* was prepared with: .*Idefics3Processor"):
        print_bin(console, name_processor(prepared, other), 0)
    gone = name_processor(prepared, tmp_path / "gone")
    with pytest.raises(UserError, match=r"no such folder\. .* was prepared with it; say where it is now: --processor"):
        print_bin(console, gone, 0)
    print_bin(console, gone, 0, str(processor_folders["qwen2_vl"]))
    with pytest.raises(UserError, match=r"no such folder$"):
        print_bin(console, gone, 0, str(tmp_path / "gone"))


def test_a_bin_that_is_not_there_is_an_error_of_the_user(processors, folder, tmp_path):
    prepared = preparation(processors["qwen2_vl"], folder, "pretrain").write(tmp_path)
    for number in (1, -1):
        with pytest.raises(UserError, match=f"has 1 bin, counted from 0; there is no bin {number}"):
            print_bin(Console(file=io.StringIO()), prepared, number)
