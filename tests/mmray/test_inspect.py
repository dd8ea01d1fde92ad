"""A bin shown to a person: counts, sources and text as they are, trained tokens in green, nothing taken for markup."""

import io

import numpy as np
import pytest
from rich.console import Console

from mmray.errors import UserError
from mmray.inspect import TRAINED, UNTRAINED, print_bin, sample_text
from mmray.masks.labels import IGNORE_INDEX
from mmray.packing_settings import PackingSettings
from tests.mmray.preparing import Preparation, chat, write_pictures, write_rows

PACKING = PackingSettings(token_capacity=900, visual_capacity=600)
ODD = "[bold red]not[/] [/markup] \x1b[31m \x9b \x07"


def spans(text, style):
    return [text.plain[span.start : span.end] for span in text.spans if str(span.style) == style]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = write_pictures(tmp_path_factory.mktemp("inspect [x]"))
    rows = [
        chat("<image>What is it?", "A page.", "Sure?", "Yes.", images=["page.png"], id="turns"),
        chat("Say it", ODD, id="[red]odd[/]\x1b[1m"),
    ]
    write_rows(folder / "chat.jsonl", rows)
    write_rows(
        folder / "pages.jsonl", [{"id": "page", "text": "<image>\nINVOICE\n<image>", "images": ["small.png"] * 2}]
    )
    return folder


def prepare(processor, folder, *kinds, **options):
    names = {"chat": "chat.jsonl", "pretrain": "pages.jsonl", "tokenized": "tokens.jsonl"}
    datasets = [{"files": (str(folder / names[kind]),), "kind": kind} for kind in kinds]
    return Preparation(processor, *datasets, packing=PACKING, **options)


@pytest.fixture
def shown(processors, processor_folders, folder, tmp_path):
    """A function that prepares rows and gives what is printed of the first bin."""

    def shown(family, *kinds, with_processor=True, color=False, **options):
        prepared = prepare(processors[family], folder, *kinds, **options).write(
            tmp_path / f"{family}-{'-'.join(kinds)}"
        )
        file = io.StringIO()
        console = Console(file=file, width=300, force_terminal=color, color_system="standard" if color else None)
        print_bin(console, prepared, 0, str(processor_folders[family]) if with_processor else None)
        return file.getvalue()

    return shown


def test_a_bin_has_a_line_of_counts_and_a_row_for_each_sample(shown, folder):
    output = shown("qwen2_vl", "chat", "pretrain", with_processor=False)
    header, titles, *rows = output.splitlines()
    assert header.startswith("bin 0 of 1   bucket mixed   ")
    assert "60 visual" in header
    assert titles.split() == [
        "id",
        "source",
        "loss",
        "on",
        "tokens",
        "of",
        "images",
        "images",
        "(width",
        "x",
        "height)",
    ]
    assert len(rows) == 4  # the last sample has two images
    assert rows[0].split()[0] == "turns"
    assert f"{folder}/chat.jsonl:1" in rows[0]
    assert f"{folder}/page.png (170 x 220)" in rows[0]
    assert " roles " in rows[0]
    assert " 48 " in rows[0]
    assert " all " in rows[2]
    assert rows[3].strip() == f"{folder}/small.png (40 x 60)"


def test_with_a_processor_the_text_is_shown_with_media_counted(shown):
    output = shown("qwen2_vl", "chat", "pretrain")
    assert "<|vision_start|>[48 × <|image_pad|>]<|vision_end|>What is it?" in output
    assert "<|vision_start|>[6 × <|image_pad|>]<|vision_end|>\nINVOICE\n" in output
    assert " trained " in output.splitlines()[1]


def test_media_of_the_tiled_families_is_shown_row_by_row(shown):
    output = shown("idefics3", "pretrain")
    cell = "<fake_token_around_image><row_1_col_{}>[4 × <image>]"
    assert f"{cell.format(1)}{cell.format(2)}\n" in output
    assert "<global-img>[4 × <image>]<fake_token_around_image>\nINVOICE\n" in output


def test_tiles_are_counted_each(shown):
    tiling = {"grid": (1, 2), "tile_size": (56, 56), "labels": True}
    output = shown("qwen2_vl", "pretrain", tiling=tiling)
    assert "<row1_col1>\n<|vision_start|>[4 × <|image_pad|>]<|vision_end|><row2_col1>\n" in output


def test_what_is_trained_is_green_and_the_rest_dim(processors, folder):
    preparation = prepare(processors["qwen2_vl"], folder, "chat")
    ((_, (turns, _)),) = preparation.windows()
    decode = preparation.family.tokenizer.decode
    trained = np.arange(len(turns.input_ids)) % 7 < 3
    trained[turns.input_ids == preparation.family.image_token_id] = False
    text = sample_text(turns.input_ids, trained, preparation.family)
    assert "".join(spans(text, TRAINED)) == decode(turns.input_ids[trained])
    untrained = decode(turns.input_ids[~trained])
    assert "".join(spans(text, UNTRAINED)) == untrained.replace("<|image_pad|>" * 48, "[48 × <|image_pad|>]")


def test_colours_follow_the_masking_of_the_dataset(shown):
    """Answers and the markers that end them; as printed, in the colours of a terminal."""
    output = shown("qwen2_vl", "chat", color=True)
    green, dim, end = "\x1b[32m", "\x1b[2m", "\x1b[0m"
    assert f"{green}A page.<|im_end|>{end}" in output
    assert f"{green}Yes.<|im_end|>{end}" in output
    assert output.count(green) == 3
    assert f"{dim}What is it?<|im_end|>{end}" in output


def test_nothing_of_the_data_is_markup_or_reaches_the_terminal_as_control(shown):
    output = shown("qwen2_vl", "chat")
    assert "[bold red]not[/] [/markup] ␛[31m \N{REPLACEMENT CHARACTER} ␇" in output
    assert "[red]odd[/]␛[1m" in output
    assert "\x1b" not in output
    assert "\x07" not in output


def test_given_labels_are_shown(shown, processors, folder):
    """Of a tokenized row, what its labels keep."""
    tokenizer = processors["qwen2_vl"].tokenizer
    ids = tokenizer("keep one two three")["input_ids"]
    labels = [IGNORE_INDEX if number < len(ids) - 3 else token for number, token in enumerate(ids)]
    write_rows(folder / "tokens.jsonl", [{"id": "t", "input_ids": ids, "labels": labels}])
    output = shown("qwen2_vl", "tokenized", color=True)
    assert " given " in output
    assert f"\x1b[32m{tokenizer.decode(ids[-3:])}\x1b[0m" in output


def test_the_numbers_of_samples_add_up_to_those_of_the_bin(shown, processors):
    output = shown("smolvlm", "chat", "pretrain")
    header, _, *rows = output.split("\n\n")[0].splitlines()
    counts = [[int(word.replace(",", "")) for word in row.split() if word.replace(",", "").isdigit()] for row in rows]
    tokens, images, trained = map(sum, zip(*(count[:3] for count in counts if len(count) >= 3)))
    assert f"{tokens:,} tokens" in header
    assert f"{trained:,} trained" in header
    assert images


def test_a_bin_that_is_not_there_is_an_error_of_the_user(processors, folder, tmp_path):
    prepared = prepare(processors["qwen2_vl"], folder, "pretrain").write(tmp_path)
    for number in (1, -1):
        with pytest.raises(UserError, match=f"has 1 bins, counted from 0; there is no bin {number}"):
            print_bin(Console(file=io.StringIO()), prepared, number)


def test_another_processor_is_refused_with_the_difference(processors, processor_folders, folder, tmp_path):
    prepared = prepare(processors["qwen2_vl"], folder, "pretrain").write(tmp_path)
    with pytest.raises(UserError, match=r"is not the processor that .* was prepared with: .*Idefics3Processor"):
        print_bin(Console(file=io.StringIO()), prepared, 0, str(processor_folders["idefics3"]))
