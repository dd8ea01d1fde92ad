"""Checkpoints of small models as training writes them, for the tests of the export."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmray.batches.micro_batch import MicroBatch, Place, mask, render
from mmray.families import Family, family_of, load_processor
from mmray.loss.sources import label_maker
from mmray.packing.settings import PackingSettings
from mmray.prepared import PreparedDataset
from mmray.run.checkpoints import checkpoint_name
from mmray.run.place import write_place
from mmray.schedule.cursor import Cursor
from mmray.schedule.schedule import Schedule
from mmray.training.checkpoint import save_state
from mmray.training.checksums import LISTS, list_files, list_name
from mmray.training.engine import TrainingEngine
from mmray.training.settings import ModelSettings, TrainingSettings
from tests.mmray.families.zoo import ZOO
from tests.mmray.noise import noise
from tests.mmray.preparing import Preparation, write_rows

PICTURES = {"wide.png": (150, 90), "tall.png": (60, 170)}
PAGES = [
    {"id": "page", "text": "<image>\nTotal 12.50", "images": ["wide.png"]},
    {"id": "two", "text": "See <image> and <image>\nas printed.", "images": ["tall.png", "wide.png"]},
    {"id": "plain", "text": "All trains run daily.", "images": []},
]
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read it."}]}
CHATS = [
    {
        "id": "chat",
        "messages": [QUESTION, {"role": "assistant", "content": "Anna Berg, of course."}],
        "images": ["tall.png"],
    }
]


@dataclass(frozen=True)
class Case:
    """A training of one step, or of one in each of two stages: of which member of the zoo, how, on which data, into
    which run."""

    member: str
    stage: int
    dtype: str
    processor: Path
    prepared: Path
    run: Path

    @property
    def model(self) -> ModelSettings:
        member = ZOO[self.member]
        return ModelSettings(
            config=member.config(self.processor).to_dict(), dtype=self.dtype, attention=member.attentions[0],
            processor=str(self.processor), seed=7,
        )  # fmt: skip

    @property
    def training(self) -> dict[str, Any]:
        """Training settings that are special to the case."""
        return {}


def prepare(member_name: str, processor: Path, folder: Path, *, packed: bool = True) -> Path:
    """The rows above as a prepared dataset: tiled where the model takes tiles; packed: several samples in a bin where
    it takes them."""
    member = ZOO[member_name]
    folder.mkdir(parents=True)
    for seed, (name, size) in enumerate(PICTURES.items()):
        noise(size, seed).save(folder / name)
    tiling = {**member.tiling, "exact_pixels": True} if member.tiling else {}
    family = family_of(load_processor(processor), tiled=bool(tiling), model_type=member.model_type)
    pages = [row for row in PAGES if row["images"] or family.takes_text_only]
    datasets = [{"files": write_rows(folder / "pages.jsonl", pages), "kind": "pretrain", "add_eos": False}]
    if member.turns:
        datasets.append({"files": write_rows(folder / "chats.jsonl", CHATS), "kind": "chat"})
    packing = PackingSettings(
        mode="bins" if packed and not member.refuses else "none", token_capacity=100_000, visual_capacity=100_000
    )
    Preparation(family, *datasets, tiling=tiling, packing=packing).write(folder / "prepared")
    return folder / "prepared"


def micro_batch(prepared: PreparedDataset, family: Family, number: int) -> MicroBatch:
    """A bin as training has it."""
    rendered = render([prepared.bin(number)], Place(0, 0, 0), family, prepared.tiling)
    return MicroBatch(mask(rendered, family, label_maker("sampled", family), torch.device("cpu")), family)


def family_for(case: Case, prepared: PreparedDataset) -> Family:
    processor = load_processor(case.processor)
    return family_of(processor, tiled=prepared.tiling.is_tiled, model_type=ZOO[case.member].model_type)


def train_cases(rank: int, world_size: int, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """On every rank: one step of each case, a checkpoint, and what the engine then has: inputs, logits, weights."""
    return [train_case(rank, world_size, case) for case in cases]


def train_case(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    prepared = PreparedDataset(str(case.prepared))
    batch = micro_batch(prepared, family_for(case, prepared), 0)
    training = TrainingSettings(
        steps=4, global_batch_bins=world_size, learning_rate=3e-3, zero_stage=case.stage, **case.training
    )
    engine = TrainingEngine(case.model, training, total_steps=4, grad_accumulation=1)
    engine.step([batch])
    if engine.is_at_border:
        border = case.run / "border"
        save_state(engine, border)
        engine.ranks.every(None)
        engine.enter_stage(border, scratch=case.run / "scratch")
        engine.step([batch])
    schedule = Schedule(
        len(prepared), global_batch_bins=world_size, seed=0, fingerprint=prepared.fingerprint, shuffle=False
    )
    part = case.run / f"of-rank-{rank}"
    save_state(engine, part)
    if rank == 0:
        cursor = Cursor.at(schedule, prepared=prepared.path)
        for _ in range(engine.step_count):
            cursor = cursor.advance()
        write_place(part, cursor, prepared)
    listed = list_files(part)
    (part / LISTS).mkdir()
    (part / list_name(rank)).write_text(listed)
    engine.deepspeed.eval()
    inputs = batch.model_inputs(engine.device, engine.dtype, engine.model.config)
    with torch.no_grad():
        logits = engine.deepspeed(**inputs, use_cache=False).logits
    weights, masters = {}, {}
    parameters = dict(engine.model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=engine.zero_stage == 3):
        weights = {name: weight.detach().clone() for name, weight in parameters.items()}
    if engine.zero_stage > 0:
        masters = {
            name: safe_get_full_fp32_param(weight).clone()
            for name, weight in parameters.items() if weight.requires_grad
        }  # fmt: skip
    engine.close()
    return {"inputs": inputs, "logits": logits, "weights": weights, "masters": masters or weights}


def join(run: Path) -> Path:
    """The checkpoint of a run, of the folders that its ranks wrote, as Ray Train does."""
    checkpoint = run / checkpoint_name(1, "x")
    for part in sorted(run.glob("of-rank-*")):
        for file in part.rglob("*"):
            if file.is_file():
                target = checkpoint / file.relative_to(part)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(file, target)
        shutil.rmtree(part)
    evaluation = {"step": 1, "epoch": 0.5, "eval_loss": 2.5, "eval_trained_tokens": 1234}
    (run / "metrics.jsonl").write_text(json.dumps(evaluation) + "\n")
    return checkpoint
