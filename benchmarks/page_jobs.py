"""Jobs over page images for the benchmarks of the Ray graphs: the pages of ../shared/data, else synthetic ones."""

import itertools
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data  # sets the level of its own loggers when imported

from mmray.config.job import Job
from mmray.synthetic.models import small_config
from mmray.synthetic.pages import write_pages
from mmray.synthetic.processors import write_processor

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
RAY_CPUS = 4
"""Logical ones: every pool fits, on machines of two cores too."""

Row = dict[str, Any]


@contextmanager
def local_ray() -> Iterator[None]:
    """A Ray of this machine alone, for as long as the block runs."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.init("local", num_cpus=RAY_CPUS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


class Pages:
    """Rows with a page each, and a processor. Files are written into `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if SHARED.is_dir():
            self.name, self.root, rows = "shared pages", SHARED, SHARED / "pages.jsonl"
            self.processor = SHARED / "processors/qwen2-vl"
        else:
            pages = write_pages(folder / "pages", 40)
            self.name, self.root, rows = "synthetic pages", pages.folder, pages.pages.path
            self.processor = write_processor(folder / "processor", "qwen2_vl")
        self.rows = list(self._usable(rows))
        small_config("qwen2_vl", self.processor).save_pretrained(folder / "model")

    def _usable(self, path: Path) -> Iterator[Row]:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line) if line.endswith("}") else {"images": []}
            if len(row["images"]) == 1 and (self.root / row["images"][0]).exists() and "bad" not in row["id"]:
                yield row

    def job(self, name: str, rows: list[Row], num_rows: int, **packing: int) -> Job:
        """A job over `num_rows` rows, those given repeated."""
        path = self.folder / f"{name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for number, row in enumerate(itertools.islice(itertools.cycle(rows), num_rows)):
                file.write(json.dumps(row | {"id": f"{row['id']}-{number}"}) + "\n")
        return Job.model_validate({
            "name": name,
            "model": {"config": str(self.folder / "model"), "processor": str(self.processor), "dtype": "fp32"},
            "data": {"train": [{"files": str(path), "kind": "pretrain", "image_root": str(self.root)}]},
            "packing": {"token_capacity": 4096, "visual_capacity": 4096, **packing},
            "training": {"steps": 1, "global_batch_bins": 2, "learning_rate": 1e-4},
            "resources": {"encode_actors": 2, "pack_actors": 1, "render_actors": 1, "mask_actors": 1},
            "output": {"prepared": str(self.folder / name), "run": str(self.folder / "run")},
        })  # fmt: skip
