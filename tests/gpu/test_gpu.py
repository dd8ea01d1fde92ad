"""The parts of `python -m tests.gpu` that need no GPU; those that do are skipped, and say so."""

from pathlib import Path

import pytest
import torch

from tests.gpu.__main__ import main
from tests.gpu.checks import CHECKS
from tests.gpu.place import CPU, Check, Place, Row, markdown, result


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(CPU, 0, tmp_path_factory.mktemp("gpu"))


@pytest.mark.parametrize("check", CHECKS, ids=[check.name for check in CHECKS])
def test_what_a_cpu_can_do_holds(check: Check, place: Place) -> None:
    row = result(check, place)
    assert row.state == ("skipped" if check.needs else "ok"), row.words
    assert not check.needs or row.words == f"needs {check.needs}"


def test_a_check_that_fails_is_told_and_the_others_go_on(place: Place) -> None:
    def broken(_: Place) -> str:
        raise AssertionError("logits differ by 3e-01 | in bf16")

    row = result(Check("it holds", broken), place)
    assert row == Row("it holds", "FAILED", "AssertionError: logits differ by 3e-01 | in bf16")
    table = markdown([row], "a machine").splitlines()
    assert table[0] == "a machine"
    assert table[-1] == "| it holds | FAILED | AssertionError: logits differ by 3e-01 \\| in bf16 |"


def test_the_command_writes_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("what is skipped without a GPU is not skipped here")
    page = tmp_path / "GPU.md"
    assert main(["labels on the device", "labels wait", "--out", str(page)]) == 0
    shown = capsys.readouterr()
    assert "no GPU here" in shown.err
    for text in (shown.out, page.read_text()):
        assert "| labels on the device equal the CPU's | ok | " in text
        assert "| labels wait for nothing | skipped | needs a GPU |" in text
