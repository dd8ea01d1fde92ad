"""What `python -m tests.gpu` checks, in its order: from single kernels to a training."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from benchmarks import bench_masks, bench_step
from mmray.batches.ahead import InputsAhead
from mmray.batches.micro_batch import MicroBatch, labelled, mask, render
from mmray.batches.micro_batch import Place as BatchPlace
from mmray.families import Family, family_of, load_processor
from mmray.images import load_image
from mmray.loss import roles
from mmray.loss.scan import scan_tensors
from mmray.masks import role_keep_mask
from mmray.packing.settings import PackingSettings
from mmray.prepared.dataset import window_bins
from mmray.prepared.window import pack_window, samples_table
from mmray.rows.sample import Sample
from mmray.training.settings import ModelSettings
from tests.gpu.place import CPU, Check, Place, milliseconds
from tests.mmray.families.small_models import small_model
from tests.mmray.families.zoo import ZOO
from tests.mmray.noise import noise
from tests.mmray.preparing import Preparation, png
from tests.mmray.run.export.cases import Case, join, prepare
from tests.mmray.training.ranks import RankGroup

PAGES = [noise(size, seed) for seed, size in enumerate([(150, 90), (60, 170), (170, 60), (90, 90)])]
LARGE = PackingSettings(token_capacity=2**20, visual_capacity=2**20)
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 4e-2}
"""Largest difference of logits, relative to the largest logit."""
CPU_MEMBERS = ("qwen2_vl",)
STAGES = (0, 1, 2, 3)


# -------------------------------------------------------------------- labels


def labels_equal(place: Place) -> str:
    """The tensor way of the scan on the device against the compiled loop of the CPU."""
    ids = bench_masks.chatml_streams(4, 4096)
    segments = (torch.arange(4096) // 1000).expand(4, -1).contiguous()
    made = partial(role_keep_mask, boundaries=bench_masks.BOUNDARIES, roles_to_train=bench_masks.TRAINED)
    expected = made(ids, segment_ids=segments)
    with mock.patch.object(roles, "scan_compiled", scan_tensors):
        found = made(ids.to(place.device), segment_ids=segments.to(place.device)).cpu()
    assert torch.equal(found, expected), f"{int((found != expected).sum())} of {expected.numel()} tokens differ"
    return f"{expected.numel():,} tokens of ChatML in bins, {int(expected.sum()):,} of them trained: equal"


def labels_without_waits(place: Place) -> str:
    """Labels and positions on the GPU with synchronisation forbidden."""
    family, batch = packed_batch("qwen2_vl", place.folder)
    layout = batch.masked
    labels = preparation(family).labels
    on = partial(torch.as_tensor, device=place.device)
    row = [on(np.array(value)) for value in (layout.input_ids, layout.lengths, layout.rules, layout.given_mask)]
    blocks, segments = (
        on(np.array(layout.blocks)),
        torch.repeat_interleave(torch.arange(len(row[1])), batch.row.lengths),
    )
    arguments = row[0].long(), on(segments), row[2].long(), row[3], blocks.long()
    labels.labels(*arguments)  # tables are copied once
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = labels.labels(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return f"{made.numel():,} tokens, no wait"


def labels_cost(place: Place) -> str:
    """What a label actor's work costs on the GPU and on a CPU: the choice of `resources.gpu_share`."""
    family, batch = packed_batch("qwen2_vl", place.folder, copies=40)
    labels = preparation(family).labels
    costs = {
        str(device): milliseconds(place, lambda device=device: labelled(batch.masked, family, labels, device))
        for device in {CPU, place.device}
    }
    words = ", ".join(f"{cost:.2f} ms on {name}" for name, cost in costs.items())
    return f"{batch.num_tokens:,} tokens: {words}, the way to the device and back counted"


# -------------------------------------------------------------------- pixels and attention


def preparation(family: Family) -> Preparation:
    return Preparation(family, {"files": "rows.jsonl", "kind": "pretrain", "add_eos": False}, packing=LARGE)


def processor_of(name: str, folder: Path) -> Any:
    """The processor of a member of the zoo."""
    place = folder / f"processor-{name}"
    if not place.exists():
        ZOO[name].write_processor(place)
    return load_processor(place)


def samples_of(family: Family, copies: int = 1) -> list[Sample]:
    """Samples of one page, of two, of none where the family takes it, and of another page."""
    rows: list[dict[str, Any]] = [
        {"text": "<image>\nTotal 12.50. Please pay.", "images": [png(PAGES[0])]},
        {"text": "See <image> and <image>\nas printed.", "images": [png(PAGES[1]), png(PAGES[2])]},
        {"text": "<image>\nAll trains run daily.", "images": [png(PAGES[3])]},
    ]
    if family.takes_text_only:
        rows.insert(1, {"text": "TIMETABLE from Ashford. All trains run daily.", "images": []})
    made = preparation(family)
    return [made.sample(row, verify=False) for _ in range(copies) for row in rows]


def batch_of(family: Family, samples: list[Sample]) -> MicroBatch:
    """Samples in one row."""
    made = preparation(family)
    bins = list(window_bins(pack_window(samples_table(samples), LARGE, made.labels, family.sample_gap)))
    rendered = render(bins, BatchPlace(0, 0, 0), family, made.policy)
    return MicroBatch(mask(rendered, family, made.labels, CPU), family)


def packed_batch(name: str, folder: Path, copies: int = 1) -> tuple[Family, MicroBatch]:
    family = family_of(processor_of(name, folder), model_type=ZOO[name].model_type)
    return family, batch_of(family, samples_of(family, copies))


def pixels_equal(place: Place) -> str:
    """Pixels made on the device, ahead and from pinned memory as in training, against the processor's."""
    worst = 0.0
    family, _ = packed_batch("qwen2_vl", place.folder)
    for page in PAGES:
        row = {"text": "<image>\nRead it.", "images": [png(page)]}
        batch = batch_of(family, [preparation(family).sample(row, verify=False)])
        inputs = InputsAhead(place.device, torch.float32, PretrainedConfig())
        inputs.add(batch)
        found = batch.model_inputs(place.device, torch.float32, PretrainedConfig())["pixel_values"].cpu()
        inputs.close()
        picture = load_image(png(page)["bytes"])
        expected = family.process(family.placeholder_unit, [picture], return_tensors="pt")["pixel_values"]
        assert found.shape == expected.shape
        worst = max(worst, float((found - expected).abs().max()))
    assert worst <= 2e-6, f"pixel_values differ by {worst:.1e}"
    return f"{len(PAGES)} pages, made ahead of their use: pixel_values differ by at most {worst:.0e}"


def logits(model: Any, batch: MicroBatch, place: Place, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        made = model(**batch.model_inputs(place.device, dtype, model.config), use_cache=False).logits
    return made[0].float().cpu()


def moved(name: str, attention: str, place: Place, dtype: torch.dtype) -> Any:
    """The small model of a member of the zoo, with an attention, on the device. Models are kept: not to be changed."""
    processor_of(name, place.folder)
    model = small_model(name, place.folder / f"processor-{name}", attention)
    return model.to(place.device, dtype).eval()


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def attention_equal(place: Place) -> str:
    """Every attention of each family that packs, against eager, fp32 and bf16."""
    known = get_args(ModelSettings.model_fields["attention"].annotation)
    asked = [name for name in ("packed", "sdpa", "flash_attention_2") if name in known]
    if not place.gpus or not has_flash():
        asked = [name for name in asked if name != "flash_attention_2"]
    done, failures = [], []
    for name in members(place):
        _, batch = packed_batch(name, place.folder)
        for dtype in (torch.float32, torch.bfloat16) if place.gpus else (torch.float32,):
            expected = logits(moved(name, "eager", place, dtype), batch, place, dtype)
            for attention in asked if dtype is torch.bfloat16 else [one for one in asked if "flash" not in one]:
                if attention not in (*ZOO[name].attentions, "packed", "flash_attention_2"):
                    continue
                far = difference(logits(moved(name, attention, place, dtype), batch, place, dtype), expected)
                done.append(f"{name} {attention}")
                if not far <= TOLERANCE[dtype]:
                    failures.append(f"{name} {attention} {str(dtype).removeprefix('torch.')}: {far:.1e}")
    assert not failures, "; ".join(failures)
    return f"{len(set(done))} pairs of a family and an attention ({', '.join(asked)}) equal eager"


def packed_is_unpacked(place: Place) -> str:
    """Logits of samples in one row against those of each alone; bf16 on a GPU."""
    dtype = torch.bfloat16 if place.gpus else torch.float32
    worst = {}
    for name in members(place):
        family, whole = packed_batch(name, place.folder)
        model = moved(name, ZOO[name].attentions[0], place, dtype)
        together, start, far = logits(model, whole, place, dtype), 0, 0.0
        for sample in in_order(family, whole):
            alone = batch_of(family, [sample])
            count = int(alone.masked.lengths[0])
            far = max(far, difference(together[start : start + count], logits(model, alone, place, dtype)[:count]))
            start += count + family.sample_gap
        worst[name] = far
    failures = [f"{name}: {far:.1e}" for name, far in worst.items() if not far <= TOLERANCE[dtype]]
    assert not failures, "; ".join(failures)
    return f"{len(worst)} families in {str(dtype).removeprefix('torch.')}: at most {max(worst.values()):.0e} apart"


def in_order(family: Family, whole: MicroBatch) -> list[Sample]:
    """The samples of a row in the order in which they were packed."""
    left, ordered, start = samples_of(family), [], 0
    ids, lengths = whole.masked.input_ids, whole.masked.lengths[~whole.masked.padding]
    for length in lengths:
        place = next(n for n, one in enumerate(left) if np.array_equal(one.input_ids, ids[start : start + length]))
        ordered.append(left.pop(place))
        start += int(length) + family.sample_gap
    return ordered


def members(place: Place) -> list[str]:
    """The families whose models pack and can be built here; a few on a CPU, whose tests have them all."""
    packing = [name for name, one in ZOO.items() if not (one.refuses or one.missing or one.missing_for_model)]
    return packing if place.gpus else [name for name in packing if name in CPU_MEMBERS]


def has_flash() -> bool:
    from importlib.util import find_spec

    return find_spec("flash_attn") is not None


# -------------------------------------------------------------------- training


def steps_at_all_stages(place: Place, world_size: int) -> str:
    """Steps, a checkpoint and the same steps from it, bf16 at every ZeRO stage."""
    from tests.gpu import training

    cases = [(stage, dtype) for dtype in ("fp32", "bf16") for stage in STAGES] if place.gpus else [(1, "fp32")]
    with tempfile.TemporaryDirectory(dir=place.folder) as folder:
        found = on_ranks(place, world_size, training.saved_and_resumed, cases, Path(folder))
    for (stage, dtype), (whole, resumed) in found[0].items():
        assert resumed == whole[1:], f"stage {stage}, {dtype}: {resumed} after resuming, {whole[1:]} without"
        first = found[0][cases[0]][0][0]
        assert abs(whole[0] / first - 1) < (1e-5 if dtype == "fp32" else 2e-2), f"stage {stage}, {dtype}: {whole[0]}"
    return f"{len(found[0])} stages and types on {world_size}: steps resumed to the bit"


def waits_of_a_step(place: Place) -> str:
    """Waits for the GPU in mmray's own frames of a step, told by torch itself."""
    from tests.gpu import training

    (waits,) = on_ranks(place, 1, training.waits_of_a_step)
    assert len(waits) <= 2, f"{len(waits)}: {'; '.join(waits)}"
    return f"{len(waits)} waits in mmray's own frames of a step of 2 micro-batches: {'; '.join(waits)}"


def export_equal(place: Place) -> str:
    """A checkpoint of ZeRO 3, exported and loaded by transformers alone."""
    from transformers import AutoModelForImageTextToText

    from mmray.run.export import export_model
    from tests.mmray.run.export.cases import train_cases

    world_size = max(1, place.gpus)
    folder = Path(tempfile.mkdtemp(dir=place.folder))
    ZOO["qwen2_vl"].write_processor(folder / "processor")
    prepared = prepare("qwen2_vl", folder / "processor", folder / "rows")
    case = Case("qwen2_vl", 3 if place.gpus else 1, "fp32", folder / "processor", prepared, folder / "run")
    (engine,) = on_ranks(place, world_size, train_cases, [case])[0]
    join(case.run)
    model = AutoModelForImageTextToText.from_pretrained(export_model(str(case.run), str(folder / "model")).folder)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, engine["weights"][name].cpu()), name
    with torch.no_grad():
        inputs = {key: value.cpu() for key, value in engine["inputs"].items()}
        far = difference(model(**inputs, use_cache=False).logits, engine["logits"].cpu())
    assert far <= 1e-3, f"logits differ by {far:.1e}"
    return f"weights equal to the bit, logits of transformers alone within {far:.0e}"


def on_ranks(place: Place, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """A function's results on so many ranks, each on a GPU of its own where there are any."""
    group = RankGroup(world_size, function, *arguments, backend="nccl" if place.gpus else "gloo")
    return group.results(timeout_seconds=300)


# -------------------------------------------------------------------- speed


def speed(place: Place) -> str:
    """Tokens a second and peak memory, packed against padded, and the share of the device's peak."""
    lines = bench_step.run()
    return "; ".join(f"{line.name}: {line.ratio:.2f} ({line.explanation})" for line in lines[:2])


def utilisation(place: Place) -> str:
    """The step of a model as wide as one of 2B: TFLOP/s of its matrices against the device's peak."""
    from tests.gpu import training

    flops, seconds = training.wide_step(place.device)
    peak = place.peak_flops
    share = "the device's peak is not known" if peak is None else f"{flops / seconds / peak:.0%} of {peak / 1e12:.0f}"
    return f"{flops / seconds / 1e12:.1f} TFLOP/s, {share}"


def profile_of_a_step(place: Place) -> str:
    """The kernels that a step spends most of its time in."""
    from tests.gpu import training

    return training.profiled(place.device)


def allocator(place: Place) -> str:
    """Memory that torch reserves beside what it uses, over rows of all lengths, with segments that grow."""
    from tests.gpu import training

    (grown,), (fixed,) = (on_ranks(place, 1, training.reserved, expandable) for expandable in (True, False))
    return f"reserved {grown / 1e6:,.0f} MB with expandable_segments, {fixed / 1e6:,.0f} MB without"


def on_one(place: Place) -> str:
    return steps_at_all_stages(place, 1)


def on_several(place: Place) -> str:
    return steps_at_all_stages(place, place.gpus)


CHECKS = [
    Check("labels on the device equal the CPU's", labels_equal),
    Check("labels wait for nothing", labels_without_waits, "a GPU"),
    Check("cost of labels", labels_cost),
    Check("pixels on the device equal the processor's", pixels_equal),
    Check("attention of each family that packs equals eager", attention_equal),
    Check("packed equals unpacked", packed_is_unpacked),
    Check("DeepSpeed steps, checkpoint and resume, one rank", on_one),
    Check("DeepSpeed steps, checkpoint and resume, several ranks", on_several, "several GPUs"),
    Check("host waits of a step", waits_of_a_step, "a GPU"),
    Check("export", export_equal),
    Check("tokens a second and peak memory, packed against padded", speed, "a GPU"),
    Check("model FLOP utilisation", utilisation, "a GPU"),
    Check("memory that is reserved", allocator, "a GPU"),
    Check("profile of a step", profile_of_a_step, "a GPU"),
]
