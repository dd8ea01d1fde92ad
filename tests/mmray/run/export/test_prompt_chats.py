"""`mmray.prompt` of chats with a system message, several turns and several tiled images, against prepared bins."""

import shutil
from pathlib import Path

import pytest
import torch

import mmray
from mmray.families import family_of, load_processor
from mmray.prepared import PreparedDataset
from mmray.run.export import Sidecar
from mmray.run.export.sidecar import SIDECAR
from tests.mmray.families.zoo import ZOO
from tests.mmray.noise import noise
from tests.mmray.preparing import PACKING, Preparation, write_rows
from tests.mmray.run.export.cases import micro_batch

SIZES = {"wide.png": (300, 120), "tall.png": (70, 260), "small.png": (50, 40)}
IMAGE = {"type": "image"}
SYSTEM = {"role": "system", "content": "You read scans; write what stands there."}
TURNS = [
    {"role": "user", "content": [IMAGE, {"type": "text", "text": "and"}, IMAGE, {"type": "text", "text": "Which?"}]},
    {"role": "assistant", "content": "The second one."},
    {"role": "user", "content": [{"type": "text", "text": "Now this:"}, IMAGE]},
    {"role": "assistant", "content": "A third, über alles."},
]
IMAGES = ["wide.png", "tall.png", "small.png"]
ROWS = [
    {"id": "with", "messages": [SYSTEM, *TURNS], "images": IMAGES},
    {"id": "without", "messages": TURNS, "images": IMAGES},
]
TILED = {"grid": [2, 2], "tile_size": [56, 56], "overview": [56, 56], "labels": True}
CASES = {
    "qwen2_vl, tiled": ("qwen2_vl", TILED),
    "qwen2_vl, whole pages": ("qwen2_vl", {}),
    "granite_docling": ("granite_docling", {**ZOO["granite_docling"].tiling, "labels": True}),
    "gemma3": ("gemma3", ZOO["gemma3"].tiling),
}


@pytest.mark.parametrize("case", CASES)
def test_a_chat_is_asked_as_it_was_trained(case, zoo_folder, tmp_path):
    """Before the last answer, and before the first: ids and pixels."""
    name, tiling = CASES[case]
    processor = zoo_folder(name)
    for seed, (file, size) in enumerate(SIZES.items()):
        noise(size, seed).save(tmp_path / file)
    policy = {**tiling, "exact_pixels": True} if tiling else {}
    family = family_of(load_processor(processor), tiled=bool(policy), model_type=ZOO[name].model_type)
    rows = {"files": write_rows(tmp_path / "rows.jsonl", ROWS), "kind": "chat"}
    packing = PACKING.model_copy(update={"mode": "none", "token_capacity": 100_000, "visual_capacity": 100_000})
    prepared = PreparedDataset(Preparation(family, rows, tiling=policy, packing=packing).write(tmp_path / "out").path)
    assert prepared.statistics["rows_packed"] == 2
    folder = tmp_path / "model"
    shutil.copytree(processor, folder)
    sidecar = Sidecar(
        mmray="1", model_type=ZOO[name].model_type, dtype="fp32", step=1, tiling=prepared.tiling,
        processor_call=family.processor_kwargs, kinds=("chat",), prepared=prepared.path,
        fingerprint=prepared.fingerprint,
    )  # fmt: skip
    (folder / SIDECAR).write_text(sidecar.text())
    prompt = mmray.prompt(str(folder))
    config = ZOO[name].config(processor)
    config._attn_implementation = ZOO[name].attentions[0]
    messages_of = {row["id"]: row["messages"] for row in ROWS}
    for number in range(2):
        packed = prepared.bin(number)
        messages, ids = messages_of[packed.sample_ids[0]], torch.tensor(packed.input_ids)
        for asked, images, answer in ((messages[:-1], IMAGES, "A third"), (messages[:-3], IMAGES[:2], "The second")):
            inputs = prompt(messages=asked, images=[str(Path(tmp_path, image)) for image in images])
            start = inputs["input_ids"][0]
            assert torch.equal(start, ids[: len(start)])
            assert prompt.decode(ids[len(start) :]).strip().startswith(answer)
            made = micro_batch(prepared, family, number).model_inputs(torch.device("cpu"), torch.float32, config)
            for pixels in ZOO[name].pixel_names:
                ours, trained = inputs[pixels], made[pixels]
                of_asked = (slice(None),) * (len(ours) == len(trained) == 1) + (slice(ours.shape[len(trained) == 1]),)
                assert torch.equal(ours, trained[of_asked])
                assert ours.shape == trained.shape or images != IMAGES
