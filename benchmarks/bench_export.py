"""The most memory that `mmray export` takes, of a model made of random weights: ZeRO 3, two ranks, bf16.

    python -m benchmarks export              # weights of 1 GB
    python -m benchmarks.bench_export 4      # of 4 GB; needs 12 GB of disk in TMPDIR

The checkpoint is laid out as DeepSpeed's ZeRO 3 lays it out (tests hold the export against DeepSpeed's own files); only
its optimizer states are left out, which export does not read. Goal: weights in their final dtype, a shard of 5 GB and
1 GB.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Result
from mmray.families import load_processor
from mmray.images import TilingPolicy
from mmray.prepared.fingerprint import processor_record
from mmray.run.place import PREPARED_FILE
from mmray.synthetic.models import small_config
from mmray.synthetic.processors import write_processor
from mmray.training.checkpoint import MODEL_FILE, STATE_FILE
from mmray.training.checksums import LISTS, list_files, list_name
from mmray.training.conversion import SHARDS
from mmray.training.model import empty_model
from mmray.training.settings import ModelSettings, TrainingSettings

RANKS = 2
LAYER_PARAMETERS = 44e6
SHARD_GIGABYTES = 5
GOAL_BESIDE_WEIGHTS = 1.0
"""Gigabytes besides weights and shard."""


def run() -> list[Result]:
    """One result: memory in gigabytes, beside the weights."""
    return [memory_of_export(1.0)]


def memory_of_export(gigabytes: float) -> Result:
    """The peak of a process that exports a model of this size in bf16."""
    with tempfile.TemporaryDirectory(prefix="mmray-bench-") as name:
        folder = Path(name)
        weights = write_checkpoint(folder, gigabytes)
        started = time.perf_counter()
        code = f"import sys; sys.argv = ['mmray', 'export', {str(folder / 'run')!r}, {str(folder / 'out')!r}]\n"
        code += "from mmray.cli import main; main()"
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    beside = peak - weights
    shard = min(SHARD_GIGABYTES, weights)
    return Result(
        name=f"memory of an export beside its weights of {weights:.2f} GB, in GB",
        ratio=beside,
        goal=shard + GOAL_BESIDE_WEIGHTS,
        lower_is_better=True,
        explanation=f"peak {peak:.2f} GB in {seconds:.0f} s, with Python, torch, transformers and DeepSpeed imported",
    )


def write_checkpoint(folder: Path, gigabytes: float) -> float:
    """A run with one checkpoint of random weights; their gigabytes in bf16."""
    checkpoint = folder / "run" / "checkpoint_00000001_x"
    write_processor(folder / "processor", "qwen2_vl")
    (checkpoint / SHARDS).mkdir(parents=True)
    config = small_config("qwen2_vl", folder / "processor").to_dict()
    config["text_config"] |= {
        "hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16, "num_key_value_heads": 4,
        "num_hidden_layers": round(gigabytes * 1e9 / 2 / LAYER_PARAMETERS),
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 10000.0},
    }  # fmt: skip
    config["text_config"].pop("layer_types", None)
    config["text_config"].pop("head_dim", None)
    config["vision_config"]["hidden_size"] = 2048
    settings = ModelSettings(config=config, processor=str(folder / "processor"))
    shapes = {name: weight.shape for name, weight in empty_model(settings).named_parameters()}
    for rank in range(RANKS):
        write_shard(checkpoint / SHARDS, rank, shapes)
    record: dict[str, Any] = {
        "tiling": TilingPolicy().model_dump(mode="json"), "datasets": [{"kind": "pretrain", "files": ["pages.jsonl"]}],
        "processor": processor_record(load_processor(folder / "processor")),
    }  # fmt: skip
    training = TrainingSettings(steps=1)
    dumped = {"model": settings.model_dump(mode="json"), "training": training.model_dump(mode="json")}
    for name, content in {
        STATE_FILE: {"step": 1, "world_size": RANKS, "zero_stage": 3, "dtype": "bf16", "lists": 1},
        MODEL_FILE: dumped,
        PREPARED_FILE: {"path": "prepared/train", "fingerprint": "none", "rows": 1, "record": record},
    }.items():
        (checkpoint / name).write_text(json.dumps(content))
    listed = list_files(checkpoint)
    (checkpoint / LISTS).mkdir()
    (checkpoint / list_name(0)).write_text(listed)
    return sum(shape.numel() for shape in shapes.values()) * 2 / 1e9


def write_shard(folder: Path, rank: int, shapes: dict[str, torch.Size]) -> None:
    """The two files of a rank, as ZeRO 3 writes them."""
    numbers = sum(-(-shape.numel() // RANKS) for shape in shapes.values())
    flat = torch.empty(numbers).uniform_(-0.02, 0.02, generator=torch.Generator().manual_seed(rank))
    half = numbers // 2
    optimizer = {
        "zero_stage": 3,
        "partition_count": RANKS,
        "fp32_flat_groups": [flat[:half].clone(), flat[half:].clone()],
    }
    del flat
    torch.save({"optimizer_state_dict": optimizer}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    model = {
        "module": {name: torch.empty(0) for name in shapes}, "param_shapes": [shapes], "buffer_names": [],
        "frozen_param_shapes": {}, "frozen_param_fragments": {}, "shared_params": {},
    }  # fmt: skip
    torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")


if __name__ == "__main__":
    print(memory_of_export(float(sys.argv[1])))
