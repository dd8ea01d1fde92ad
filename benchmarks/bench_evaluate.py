"""Reading by generation: tokens a second in batches, against a plain loop of transformers over the same rows.

The plain loop is what people write, one row after another with `model.generate`. Both begin with the same decoded
tiles, write as many tokens for a row as an evaluation allows it (by the length of its reference) and end no text early,
so both do the same work; what a batch writes beyond a row's own number counts for nothing. Then the 64 rows of an
evaluation against 200 steps of training, whose pages, tiles and model are the demo's.
"""

import tempfile
import time
from pathlib import Path

import torch
from transformers import GenerationConfig

from benchmarks.common import Result
from mmray.batches.micro_batch import MicroBatch, Place, mask, render
from mmray.config.job import Job
from mmray.loss.sources import label_maker
from mmray.prepared.driver import prepare
from mmray.run.evaluation.evaluator import RowEvaluator
from mmray.run.evaluation.generate import plain_generation
from mmray.run.evaluation.model import EvaluatedModel
from mmray.run.evaluation.prompts import ReadingTask
from mmray.run.evaluation.rows import EvaluationData, RenderedBatch, RowBatch, RowRenderer
from mmray.run.evaluation.standalone import EvaluationPlan
from mmray.run.scoring.settings import EvaluationSettings
from mmray.synthetic.models import small_config
from mmray.synthetic.pages import write_pages
from mmray.synthetic.processors import write_processor
from mmray.training.loss import packed_loss_sum

ROWS = 64
STEPS = 200
TIMED_MICRO_BATCHES = 4
GOAL, SHARE_GOAL = 3.0, 0.1


def run() -> list[Result]:
    """Two results: the rate of generation, and evaluation's share of a training's time."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mmray-bench-") as name:
        job = demo_job(Path(name))
        settings = EvaluationSettings.model_validate({"generate": {"batch_rows": 16}})
        plan = EvaluationPlan(job, EvaluatedModel("base", "base"), EvaluationData.of(job, "eval"), settings)
        encoder = plan.encoder()
        evaluator = plan.evaluator(encoder, torch.device("cpu"))
        rows = [row for chunk in plan.data.chunks(None) for batch in encoder.batches(chunk) for row in batch.rows]
        rendered = RowRenderer(encoder.family, encoder.policy)(RowBatch("rows", tuple(rows[:ROWS])))
        tasks = tasks_of(evaluator, rendered)
        evaluator._writer.stop_token_ids = (evaluator.family.num_token_ids + 1,)  # no text ends early
        limits = [task.most_tokens(settings.generate) for task in tasks]
        batched = seconds_of_batches(evaluator, tasks, limits)
        alone = seconds_of_plain_loop(evaluator, tasks, limits)
        training = seconds_of_training(job, evaluator)
    tokens = sum(limits)
    return [
        Result(
            name=f"generated tokens a second, {len(tasks)} rows in batches of 16 against one by one by transformers",
            ratio=alone / batched, goal=GOAL,
            explanation=f"{tokens / batched:,.0f} tokens a second against {tokens / alone:,.0f}, one thread",
        ),
        Result(
            name=f"generation for {len(tasks)} rows against {STEPS} steps of the demo's model",
            ratio=batched / training, goal=SHARE_GOAL, lower_is_better=True,
            explanation=f"{batched:.1f} s against {training:.0f} s by {TIMED_MICRO_BATCHES} micro-batches; one thread",
        ),
    ]  # fmt: skip


def demo_job(folder: Path) -> Job:
    """The demo's model, processor, pages and tiles, in a folder."""
    pages = write_pages(folder / "data", num_pages=160)
    assert pages.pages.num_rows >= ROWS
    processor = write_processor(folder / "processor", "qwen2_vl")
    small_config("qwen2_vl", processor).save_pretrained(folder / "model")
    rows = [{"files": str(folder / "data" / "pages.jsonl"), "kind": "pretrain"}]
    return Job.model_validate(
        {
            "name": "bench",
            "model": {"config": str(folder / "model"), "processor": str(processor), "dtype": "fp32"},
            "data": {"train": rows, "eval": rows, "max_rejected_share": 1.0},
            "images": {
                "buckets": [
                    {"max_ratio": 0.9, "grid": [3, 2]}, {"max_ratio": 1.7, "grid": [2, 3]}, {"grid": [2, 4]},
                ],
                "tile_size": [112, 112], "overview": [112, 112], "overlap": 0.05, "labels": True,
            },
            "packing": {"token_capacity": 1024, "visual_capacity": 512},
            "training": {"steps": STEPS, "global_batch_bins": 8},
            "output": {"prepared": str(folder / "prepared"), "run": str(folder / "run")},
        }
    )  # fmt: skip


def tasks_of(evaluator: RowEvaluator, rendered: RenderedBatch) -> list[ReadingTask]:
    """What is read of each row that can be read."""
    tasks = []
    for row, arrays in zip(rendered.batch.rows, rendered.rendered):
        batch = MicroBatch(mask(arrays, evaluator.family, evaluator._labels, torch.device("cpu")), evaluator.family)
        if not batch.skipped and row.bin.images:
            tasks += evaluator._cutter.tasks(batch, row.kind)
    return tasks


def seconds_of_batches(evaluator: RowEvaluator, tasks: list[ReadingTask], limits: list[int]) -> float:
    """Seconds in which mmray writes all texts. limits: numbers of their tokens."""
    started = time.perf_counter()
    written = evaluator._writer.write_all(tasks)
    seconds = time.perf_counter() - started
    assert [len(text.token_ids) for text in written] == limits
    return seconds


def seconds_of_plain_loop(evaluator: RowEvaluator, tasks: list[ReadingTask], limits: list[int]) -> float:
    """Seconds in which transformers writes as many tokens for the same prompts, one row after another."""
    started = time.perf_counter()
    with plain_generation(evaluator.model):
        for task, limit in zip(tasks, limits):
            inputs = evaluator._writer._inputs([task])
            config = GenerationConfig(max_new_tokens=limit, do_sample=False, use_cache=True, pad_token_id=0)
            output = evaluator.model.generate(**inputs, generation_config=config)
            assert output.shape[1] == inputs["input_ids"].shape[1] + limit
    return time.perf_counter() - started


def seconds_of_training(job: Job, evaluator: RowEvaluator) -> float:
    """Seconds of forward and backward passes of 200 steps, from those of a few micro-batches of one bin."""
    prepared, _ = prepare(job, "train")
    labels = label_maker(job.loss, evaluator.family)
    model = evaluator.model.train()
    timings = []
    for number in range(TIMED_MICRO_BATCHES + 1):
        rendered = render([prepared.bin(number % len(prepared))], Place(0, 0, 0), evaluator.family, prepared.tiling,
                          on_bad_row="reject")  # fmt: skip
        batch = MicroBatch(mask(rendered, evaluator.family, labels, torch.device("cpu")), evaluator.family)
        started = time.perf_counter()
        inputs = batch.model_inputs(torch.device("cpu"), torch.float32, model.config)
        packed_loss_sum(model, inputs, batch.labels).backward()
        timings.append(time.perf_counter() - started)
    return sum(timings[1:]) / TIMED_MICRO_BATCHES * job.training.global_batch_bins * STEPS
