"""Pages of PDFs: sizes without rendering, pixels, and a reason for what cannot be rendered."""

import io
import math
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pypdfium2
import pytest
from PIL import Image

from mmray.errors import RowError
from mmray.images import TilingPolicy, cut_tiles, image_size, load_image, pdf, plan_tiles, read_header, render_tiles
from mmray.images.paged import PageOfFile, each_page
from mmray.images.size_cache import SizeCache, read_sizes
from mmray.images.tile_cache import TileCache
from tests.mmray.pdfs import ENCRYPTED, pdf_of


@pytest.fixture(autouse=True)
def _closed():
    yield
    pdf._documents.close()


@pytest.fixture
def scan(tmp_path: Path) -> str:
    return pdf_of(tmp_path / "scan.pdf", [{}, {"rotation": 90}, {"crop": (0, 0, 100, 80)}])


def test_sizes_are_those_of_rendered_pages_whatever_turns_and_crops_them(tmp_path: Path) -> None:
    draw = random.Random(0)
    settings = []
    for _ in range(46):
        width, height = draw.uniform(20, 900), draw.uniform(20, 1300)
        page: dict[str, object] = {"points": (width, height), "rotation": draw.choice([0, 90, 180, 270])}
        if draw.random() < 0.5:
            page["crop"] = (draw.uniform(0, 9), draw.uniform(0, 9), draw.uniform(11, width), draw.uniform(11, height))
        settings.append(page)
    settings += [{"points": points} for points in ((612, 792), (595.276, 841.89), (595.32, 841.92))]
    path = pdf_of(tmp_path / "many.pdf", settings)
    document = pypdfium2.PdfDocument(path)
    for dpi in (36, 72, 100, 150, 203):
        for number in range(1, len(settings) + 1):
            source = f"{path}#page={number}&dpi={dpi}"
            width, height = document[number - 1].get_size()  # of the page itself, loaded
            expected = math.ceil(width * dpi / 72), math.ceil(height * dpi / 72)
            assert image_size(source) == expected
            if expected[0] * expected[1] < 400_000:
                assert load_image(source).size == expected
                by_library = document[number - 1].render(scale=dpi / 72).to_pil().size
                assert max(abs(a - b) for a, b in zip(by_library, expected)) <= 1  # it rounds the scale first
    document.close()


def test_the_pixels_of_a_page(scan: str) -> None:
    """The square lies at the lower left; a quarter turn brings it to the upper left."""
    page = load_image(f"{scan}#page=1&dpi=72")
    assert (page.mode, page.size) == ("RGB", (200, 300))
    assert [page.getpixel(at) for at in ((20, 280), (20, 20), (180, 280))] == [(255, 0, 0), (255,) * 3, (255,) * 3]
    turned = load_image(f"{scan}#page=2&dpi=72")
    assert turned.size == (300, 200)
    assert [turned.getpixel(at) for at in ((20, 20), (280, 20))] == [(255, 0, 0), (255,) * 3]
    cropped = load_image(f"{scan}#page=3&dpi=144")
    assert cropped.size == (200, 160)
    assert cropped.getpixel((10, 150)) == (255, 0, 0)


def test_the_default_resolution_and_the_header(scan: str) -> None:
    header = read_header(f"{scan}#page=1")
    assert header.size == load_image(f"{scan}#page=1").size == (417, 625)
    assert (header.format, header.mode, header.num_frames, header.orientation) == ("PDF", "RGB", 3, 1)


def test_the_tiles_of_a_page(scan: str) -> None:
    source = f"{scan}#page=1&dpi=150"
    policy = TilingPolicy(grid=(2, 2), tile_size=(128, 128))
    plan = plan_tiles(image_size(source), policy)
    for exact, fast in zip(cut_tiles(load_image(source), plan), render_tiles(source, plan), strict=True):
        assert np.abs(np.asarray(exact, np.int16) - np.asarray(fast, np.int16)).max() <= 2
    whole = plan_tiles(image_size(source), TilingPolicy())
    assert np.array_equal(np.asarray(render_tiles(source, whole)[0]), np.asarray(load_image(source)))


def test_text_of_a_page(scan: str) -> None:
    assert [pdf.page_text(PageOfFile(scan, number)) for number in (1, 2)] == ["Page 1", "Page 2"]


# ------------------------------------------------------------ reasons


def reason(source: str, **options: int) -> tuple[str, str]:
    with pytest.raises(RowError) as caught:
        image_size(source, **options)
    with pytest.raises(RowError) as loading:
        load_image(source, **options)
    assert loading.value.reason == caught.value.reason
    assert "\n" not in caught.value.message
    return caught.value.reason, caught.value.message


def test_a_page_that_there_is_not(scan: str) -> None:
    for number in (0, 4):
        found, message = reason(f"{scan}#page={number}")
        assert found == "pdf_page"
        assert "3 pages" in message


def test_a_page_that_is_too_large(scan: str) -> None:
    assert image_size(f"{scan}#page=1&dpi=72", max_pixels=60_000) == (200, 300)
    found, message = reason(f"{scan}#page=1&dpi=72", max_pixels=59_999)
    assert found == "image_too_large"
    assert "60000 pixels at 72 dpi" in message


def test_an_encrypted_document(tmp_path: Path) -> None:
    (tmp_path / "secret.pdf").write_bytes(ENCRYPTED)
    found, message = reason(f"{tmp_path}/secret.pdf#page=1")
    assert found == "pdf_encrypted"
    assert "password" in message


def test_a_damaged_document(scan: str, tmp_path: Path) -> None:
    (tmp_path / "noise.pdf").write_bytes(random.Random(0).randbytes(5000))
    (tmp_path / "empty.pdf").write_bytes(b"")
    assert {reason(f"{tmp_path}/{name}.pdf#page=1")[0] for name in ("noise", "empty")} == {"pdf_damaged"}
    assert reason(f"{tmp_path}/nowhere.pdf#page=1")[0] == "image_missing"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>404</html>", "a web page (HTML)"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"", "the file is empty"), (bytes(9000), "begins with zeros"),
    ],
)  # fmt: skip
def test_what_is_called_a_pdf_and_is_none_says_what_it_is(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(content)
    with pytest.raises(RowError, match=r"pdf_damaged.*no PDF, but") as caught:
        image_size(f"{tmp_path}/a.pdf#page=1")
    assert words in caught.value.message


@pytest.mark.parametrize("points", [(0.0, 100.0), (100.0, float("nan")), (-5.0, 5.0)])
def test_a_page_without_area(scan: str, points: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """PDFium has a letter page in the place of most of them."""
    monkeypatch.setattr(pypdfium2.PdfDocument, "get_page_size", lambda document, index: points)
    assert reason(f"{scan}#page=1")[0] == "pdf_empty_page"


def test_a_pdf_named_without_a_page_says_how_to_name_one(scan: str) -> None:
    with pytest.raises(RowError, match=r"image_unreadable.*a PDF; name a page of it.*#page=1"):
        image_size(scan)


# ------------------------------------------------------------ names


def test_ranges_of_pages() -> None:
    assert each_page("a.pdf#pages=2-4") == ["a.pdf#page=2", "a.pdf#page=3", "a.pdf#page=4"]
    assert each_page("a.pdf#pages=2-2&dpi=90") == ["a.pdf#page=2&dpi=90"]
    assert each_page("a#pages=1-2.jpg") == ["a#pages=1-2.jpg"], "no file of pages"
    for wrong in ("a.pdf#pages=", "a.pdf#pages=3", "a.pdf#pages=0-2", "a.pdf#pages=5-2", "a.pdf#pages=1-99999"):
        with pytest.raises(RowError, match="wrong_type"):
            each_page(wrong)


def test_names_of_pages() -> None:
    assert PageOfFile.written("s3://b/x.PDF#page=12&dpi=90") == PageOfFile("s3://b/x.PDF", 12, 90)
    assert PageOfFile.written("x.jpg#page=1") is None
    assert PageOfFile.written("x.pdf") is None
    for text in ("a/b.pdf#page=3", "a.tif#page=2", "s.tar#a.pdf@512+99#page=1&dpi=72"):
        assert str(PageOfFile.written(text)) == text
    assert PageOfFile("s.tar#a.pdf@512+99", 1).is_pdf
    assert not PageOfFile("a.tiff", 1).is_pdf


# ------------------------------------------------------------ documents kept open


def test_few_documents_stay_open(tmp_path: Path) -> None:
    paths = [pdf_of(tmp_path / f"{number}.pdf", [{}]) for number in range(pdf.MAX_DOCUMENTS + 4)]
    for path in paths * 2:
        assert image_size(f"{path}#page=1&dpi=72") == (200, 300)
    assert list(pdf._documents._open) == paths[4:]


def test_a_document_that_has_changed_is_read_anew(scan: str) -> None:
    assert image_size(f"{scan}#page=1&dpi=72") == (200, 300)
    pdf_of(Path(scan), [{"points": (50, 60)}])
    os.utime(scan, (1, 1))
    assert image_size(f"{scan}#page=1&dpi=72") == (50, 60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_opens_documents_anew(scan: str) -> None:
    image_size(f"{scan}#page=1")
    child = os.fork()
    if child == 0:
        os._exit(0 if not pdf._documents._open and load_image(f"{scan}#page=2&dpi=72").size == (300, 200) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert load_image(f"{scan}#page=1&dpi=72").size == (200, 300)


def test_documents_of_remote_storage(scan: str, remote) -> None:
    type(remote).contents["scan.pdf"] = Path(scan).read_bytes()
    sources = [f"counted://scan.pdf#page={number}&dpi=72" for number in (1, 2, 3)]
    assert [image_size(source) for source in sources] == [(200, 300), (300, 200), (100, 80)]
    assert np.array_equal(np.asarray(load_image(sources[1])), np.asarray(load_image(f"{scan}#page=2&dpi=72")))
    assert len(type(remote).ranges) == 1, "the document is fetched once"


def test_threads_fetch_at_the_same_time_and_each_document_once(scan: str, remote) -> None:
    for number in range(3):
        type(remote).contents[f"{number}.pdf"] = Path(scan).read_bytes()
    sources = [f"counted://{number}.pdf#page={page}&dpi=72" for number in range(3) for page in (1, 2, 3)] * 3
    with ThreadPoolExecutor(9) as threads:
        sizes = list(threads.map(image_size, sources))
        pages = list(threads.map(load_image, sources))
    assert sizes == [page.size for page in pages] == [(200, 300), (300, 200), (100, 80)] * 9
    assert len(type(remote).ranges) == 3
    assert pdf._documents._fetching == {}


def test_caches_know_pages(scan: str, tmp_path: Path) -> None:
    known = SizeCache(read_sizes(str(tmp_path / "sizes")))
    source = f"{scan}#page=1&dpi=72"
    assert known.image_size(source) == known.image_size(source) == (200, 300)
    assert len(known.take_new()) == 1
    tiles = TileCache(tmp_path / "tiles", 10**8)
    plan = plan_tiles((200, 300), TilingPolicy(grid=(1, 2), tile_size=(64, 64)))
    first, again = (tiles.render_tiles(source, plan) for _ in range(2))
    assert [each.tobytes() for each in first] == [each.tobytes() for each in again]
    other = tiles.render_tiles(f"{scan}#page=1&dpi=72", plan)
    assert [each.tobytes() for each in other] == [each.tobytes() for each in first]


# ------------------------------------------------------------ pages of pictures


@pytest.fixture
def frames() -> list[Image.Image]:
    return [
        Image.new("RGB", size, color) for size, color in (((30, 20), "red"), ((20, 40), "lime"), ((30, 20), "blue"))
    ]


def test_pages_of_a_tiff(frames: list[Image.Image], tmp_path: Path) -> None:
    frames[0].save(tmp_path / "fax.tif", save_all=True, append_images=frames[1:])
    for number, frame in enumerate(frames, 1):
        source = f"{tmp_path}/fax.tif#page={number}"
        assert image_size(source) == frame.size
        assert load_image(source).tobytes() == frame.tobytes()
    assert reason(f"{tmp_path}/fax.tif#page=4")[0] == "image_page"


@pytest.mark.parametrize(("suffix", "options"), [("gif", {}), ("webp", {"lossless": True}), ("png", {})])
def test_frames_of_animations(suffix: str, options: dict[str, object], tmp_path: Path) -> None:
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "lime", "blue")]
    path = tmp_path / f"three.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    for number, frame in enumerate(frames, 1):
        source = f"{path}#page={number}"
        assert image_size(source) == (30, 20)
        assert load_image(source).tobytes() == frame.tobytes()
    assert reason(f"{path}#page=4")[0] == "image_page"
    file = io.BytesIO(path.read_bytes())
    assert load_image(file).tobytes() == frames[0].tobytes()
