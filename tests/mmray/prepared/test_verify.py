"""`mmray verify`: every picture once; what is broken, blank or not what was prepared; continued after a stop."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmray import cli
from mmray.errors import UserError
from mmray.images import jpeg
from mmray.prepared import verify as module
from mmray.prepared.verify import Part, PartResult, in_processes, verify
from tests.mmray.pdfs import pdf_of
from tests.mmray.preparing import PACKING, Preparation, blank_unseen, write_rows


def print_of(seed: int, size: tuple[int, int] = (90, 120)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        print_of(number).save(tmp_path / f"good{number}.jpg")
    print_of(9).save(tmp_path / "noise.jpg")
    print_of(9).save(tmp_path / "cut.jpg")
    print_of(9).save(tmp_path / "gone.png")
    print_of(9).save(tmp_path / "other.jpg", "PNG")
    print_of(9).save(tmp_path / "changed.png")
    print_of(9, (160, 160)).save(tmp_path / "hole.webp", lossless=True)
    Image.new("RGB", (90, 120), (250, 251, 252)).save(tmp_path / "blank.png")
    pdf_of(tmp_path / "scan.pdf", [{"points": (90, 120)}, {"points": (90, 120), "text": ""}])
    return tmp_path


def prepared_in(processor: Any, folder: Path) -> str:
    names = [f"good{number}.jpg" for number in range(6)]
    names += [
        "noise.jpg",
        "cut.jpg",
        "gone.png",
        "other.jpg",
        "changed.png",
        "blank.png",
        "scan.pdf#page=1",
        "hole.webp",
    ]
    rows = [{"id": name, "text": "<image> x", "images": [name]} for name in names]
    rows.append({"id": "bytes", "text": "<image> x", "images": [{"bytes": _text_of(folder / "good0.jpg")}]})
    rows.append({"id": "again", "text": "<image> x", "images": ["good1.jpg"]})
    dataset = {"files": write_rows(folder / "rows.jsonl", rows), "kind": "pretrain"}
    packing = PACKING.model_copy(update={"mode": "none"})
    Preparation(processor, dataset, packing=packing, tiling={"pdf_dpi": 72}).write(folder / "prepared")
    return f"{folder}/prepared"


def _text_of(path: Path) -> str:
    import base64

    return base64.b64encode(path.read_bytes()).decode()


def break_them(folder: Path) -> None:
    """After preparing: files rot, vanish and change."""
    blank_unseen(folder / "noise.jpg")
    whole = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3] + b"\xff\xd9")
    (folder / "gone.png").unlink()
    print_of(9, (120, 90)).save(folder / "changed.png")
    whole = (folder / "hole.webp").read_bytes()
    (folder / "hole.webp").write_bytes(whole[:40960] + bytes(4096) + whole[45056:])


LISTED = {
    "noise.jpg": "image_unreadable", "cut.jpg": "image_corrupt", "gone.png": "image_missing",
    "other.jpg": "other_format", "changed.png": "image_changed", "blank.png": "blank", "hole.webp": "hole",
}  # fmt: skip


def reported(path: str) -> dict[str, str]:
    lines = Path(f"{path}-verify/report.jsonl").read_text().splitlines()
    return {entry["row"]: entry["reason"] for entry in map(json.loads, lines)}


def test_sound_pictures_are_not_listed(processors: dict[str, Any], folder: Path) -> None:
    path = prepared_in(processors["qwen2_vl"], folder)
    verified = verify(path, run_parts=in_processes(1))
    assert reported(path) == {"other.jpg": "other_format", "blank.png": "blank"}
    assert (verified.pictures, verified.broken) == (15, 0), "good1.jpg is looked at once"


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_not_sound_is_listed(
    processors: dict[str, Any], folder: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BINS_PER_PART", 8)
    path = prepared_in(processors["qwen2_vl"], folder)
    break_them(folder)
    seen = []
    verified = verify(
        path, run_parts=in_processes(processes), on_progress=lambda done, total: seen.append((done, total))
    )
    assert reported(path) == LISTED
    assert verified.broken == 4
    assert dict(verified.listed) == dict.fromkeys(LISTED.values(), 1)
    assert verified.examples["image_missing"].source == f"{folder}/rows.jsonl:9"
    assert seen[-1] == (16, 16)
    summary = json.loads(Path(f"{path}-verify/summary.json").read_text())
    assert (summary["broken"], summary["listed"]) == (4, dict.fromkeys(sorted(LISTED.values()), 1))


def test_a_stopped_run_goes_on_where_it_was(
    processors: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BINS_PER_PART", 4)
    path = prepared_in(processors["qwen2_vl"], folder)
    break_them(folder)
    looked: list[int] = []
    part = module.verify_part

    def stopping(path: str, one: Part) -> PartResult:
        looked.append(one.first)
        if one.first == 8 and looked.count(8) == 1:
            raise KeyboardInterrupt
        return part(path, one)

    monkeypatch.setattr(module, "verify_part", stopping)
    with pytest.raises(KeyboardInterrupt):
        verify(path, run_parts=in_processes(1))
    verified = verify(path, run_parts=in_processes(1))
    assert looked == [0, 4, 8, 8, 12]
    assert reported(path) == LISTED
    assert verified.pictures == 16, "good1.jpg stands in two parts"
    verify(path, run_parts=in_processes(1))
    assert looked == [0, 4, 8, 8, 12], "nothing is left to do"


def test_another_dataset_is_looked_at_anew(processors: dict[str, Any], folder: Path) -> None:
    path = prepared_in(processors["qwen2_vl"], folder)
    verify(path, run_parts=in_processes(1))
    (folder / "good5.jpg").unlink()
    print_of(5, (60, 80)).save(folder / "good5.jpg")
    break_them(folder)
    for file in Path(path).iterdir():
        file.unlink()
    rows = [{"id": "one", "text": "<image> x", "images": ["good5.jpg"]}]
    dataset = {"files": write_rows(folder / "rows.jsonl", rows), "kind": "pretrain"}
    Preparation(processors["qwen2_vl"], dataset).write(path)
    assert verify(path, run_parts=in_processes(1)).pictures == 1


def test_the_command(
    processors: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prepared_in(processors["qwen2_vl"], folder)

    def run(*options: str) -> int:
        monkeypatch.setattr("sys.argv", ["mmray", "verify", path, "--processes", "1", *options])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return int(str(done.value.code))

    assert run() == 0
    break_them(folder)
    for file in Path(f"{path}-verify").iterdir():
        file.unlink()
    assert run() == 1
    printed = capsys.readouterr()
    assert "image_missing" in printed.out
    assert "report.jsonl" in "".join(printed.out.split())
    assert "decoding in 1 processes of this machine; --address names a Ray cluster" in printed.err
    assert run("--address", "auto") == 2, "here or there"


def test_the_command_goes_to_the_cluster_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda program, words: started.append(words[1:]) or sys.exit(0))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for options, address in ([["--address", "auto"], None], [[], "10.0.0.1:6379"]):
        if address:
            monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr("sys.argv", ["mmray", "verify", "/data/prepared", *options])
        with pytest.raises(SystemExit):
            cli.main()
    assert [Path(words[0]).name for words in started] == ["verify.py"] * 2
    assert [words[1:] for words in started] == [["/data/prepared", "--address", "auto"], ["/data/prepared"]]


def test_what_was_not_written_to_its_end_is_listed(tmp_path: Path) -> None:
    """Of a format that is not compressed; a black frame around a page is none such."""
    whole = np.asarray(print_of(3, (90, 120)))
    for share, listed in [(0.0, []), (0.1, []), (0.5, ["blank"])]:
        pixels = whole.copy()
        pixels[round(120 * (1 - share)) :] = 0
        Image.fromarray(pixels).save(tmp_path / "page.bmp")
        assert [reason for reason, _ in module.picture_problems(f"{tmp_path}/page.bmp", (90, 120))] == listed


def test_processes_that_decode_do_without_torch() -> None:
    """Each of them would need 200 MB more."""
    code = "import sys; sys.modules['torch'] = None; import mmray.prepared.verify"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_where_nothing_is_prepared(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prepared dataset"):
        verify(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_that_ends_before_its_pixels_do(options: dict[str, Any]) -> None:
    file = io.BytesIO()
    print_of(3, (320, 240)).save(file, "JPEG", **options)
    whole = file.getvalue()
    assert not jpeg.lacks_pixels(whole)
    assert not jpeg.lacks_pixels(whole[:-2])
    for share in (0.5, 0.8, 0.95):
        assert jpeg.lacks_pixels(whole[: int(share * len(whole))] + b"\xff\xd9")
