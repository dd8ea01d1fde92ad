"""What it costs to know whose text is whose: encoding chats against rendering and tokenising them alone.

The second way is all that must be done for the same token ids, and all that was done before what trains was derived
from the messages: the template once, the tokenizer's fastest call once. Rows are of one form and of many: a form is
looked at once. CPU time, one thread. Against the encoder before (revision f4b23e2, both in turn on one machine): 1.07
times as long for 2 turns, 1.25 for 20, and 1.02 for the pages of pretraining; a chat of 30 tokens takes 0.24 ms instead
of 0.10.
"""

import random
import time
from typing import Any

import numpy as np

from benchmarks.bench_lengths import WHOLE, inputs, one_thread
from benchmarks.common import Result, best_seconds
from mmray.families import Family, family_of
from mmray.packing.settings import PackingSettings
from mmray.rows.encode import Encoder
from mmray.rows.read import RawRow
from mmray.rows.sample import Sample
from mmray.rows.settings import DatasetSettings, DataSettings

GOAL = 1.5
NUM_ROWS = 32
NUM_WORDS = 1500
"""About 2,200 tokens of Qwen's vocabulary."""


def run() -> list[Result]:
    with one_thread(), inputs() as found:
        family = family_of(next(iter(found.processors.values())))
        texts = " ".join(row["text"].replace("<image>", "") for row in found.rows).split()
        return [encoding(family, texts, turns) for turns in (2, 20)]


def encoding(family: Family, words: list[str], turns: int) -> Result:
    """Chats of some turns and about NUM_WORDS words."""
    drawn = random.Random(turns)
    length = NUM_WORDS // turns
    rows: list[dict[str, Any]] = []
    for number in range(NUM_ROWS):
        starts = [drawn.randrange(max(len(words) - length, 1)) for _ in range(turns)]
        contents = [" ".join(words[start : start + length]) for start in starts]
        roles = ("user", "assistant")
        messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(contents)]
        rows.append({"id": str(number), "messages": messages})
    dataset = DatasetSettings(files=("rows.jsonl",), kind="chat")
    packing = PackingSettings(token_capacity=1 << 20, visual_capacity=1 << 20)
    encoder = Encoder(DataSettings(train=(dataset,)), (dataset,), family, WHOLE, packing)
    raw = [RawRow(f"rows.jsonl:{number}", 0, row) for number, row in enumerate(rows)]
    samples = encoder.encode(raw)
    if bad := [sample for sample in samples if not isinstance(sample, Sample)]:
        raise AssertionError(f"{len(bad)} rows were rejected, the first: {bad[0]}")
    processor, backend = family.processor, family.tokenizer.backend_tokenizer

    def alone() -> list[np.ndarray]:
        texts = [processor.apply_chat_template(row["messages"], tokenize=False) for row in rows]
        encoded = backend.encode_batch_fast(texts, add_special_tokens=True)
        return [np.asarray(each.ids, dtype=np.int32) for each in encoded]

    for sample, ids in zip(samples, alone(), strict=True):
        if not isinstance(sample, Sample) or not np.array_equal(sample.input_ids, ids):
            raise AssertionError("the two ways give other tokens")
    whole = best_seconds(lambda: encoder.encode(raw), 8, clock=time.process_time) / NUM_ROWS
    least = best_seconds(alone, 8, clock=time.process_time) / NUM_ROWS
    tokens = sum(len(sample.input_ids) for sample in samples if isinstance(sample, Sample)) / NUM_ROWS
    return Result(
        name=f"encoding a chat of {turns} turns against its template and tokenizer alone",
        ratio=whole / least,
        explanation=f"{1e3 * whole:.2f} ms a row of {tokens:,.0f} tokens against {1e3 * least:.2f}; equal tokens",
        goal=GOAL,
        lower_is_better=True,
    )
