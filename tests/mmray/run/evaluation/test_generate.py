"""Every kind of model writes for a batch what it writes for each row alone: what training's own forward finds likely.

The oracle is one packed forward without a cache, as in training, over the prompt and all that was written after it.
"""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmray.batches.micro_batch import MicroBatch, Place, mask, render
from mmray.loss.rules import LossRule
from mmray.loss.sources import label_maker
from mmray.prepared import PreparedDataset
from mmray.run.evaluation.generate import TextGenerator
from mmray.run.evaluation.prompts import PromptCutter
from mmray.run.scoring.settings import GenerateSettings
from mmray.training.model import build_model
from mmray.training.settings import ModelSettings
from tests.mmray.families.zoo import ZOO
from tests.mmray.run.export.cases import Case, family_for, micro_batch, prepare

MEMBERS = [name for name, member in ZOO.items() if not member.missing and not member.missing_for_model]


@pytest.fixture(params=MEMBERS)
def member(request):
    return ZOO[request.param]


def built(member, processor):
    settings = ModelSettings(
        config=member.config(processor).to_dict(), dtype="fp32", attention="packed",
        processor=str(processor), seed=7,
    )  # fmt: skip
    model = build_model(settings).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(member.scale / 2)
        member.prepare_model(model)
    return model


def test_a_batch_is_read_as_its_rows_are(member, zoo_folder, tmp_path):
    processor = zoo_folder(member.name)
    prepared = PreparedDataset(str(prepare(member.name, processor, tmp_path / "rows", packed=False)))
    case = Case(member.name, 0, "fp32", processor, tmp_path, tmp_path)
    family, model = family_for(case, prepared), built(member, processor)
    settings = GenerateSettings(max_new_tokens=6, turns="all")
    cutter = PromptCutter(family, settings)
    kinds = [dataset["kind"] for dataset in prepared.manifest["record"]["datasets"]]
    tasks, bins = [], []
    for number in range(len(prepared)):
        packed = prepared.bin(number)
        if packed.images:
            own_tasks = cutter.tasks(micro_batch(prepared, family, number), kinds[packed.sample_sets[0]])
            tasks += own_tasks
            bins += [packed] * len(own_tasks)
    references = {re.sub(r"<think>\s*</think>", "", task.reference).strip() for task in tasks}  # empty thoughts
    assert references == {"Total 12.50", "as printed."} | ({"Anna Berg, of course."} if member.turns else set())
    writer = TextGenerator(model, cutter, settings, dtype=torch.float32, device=torch.device("cpu"))
    writer.stop_token_ids = (0,)  # random weights may end at once
    alone = [writer.write([task])[0] for task in tasks]
    assert writer.write_all(tasks) == alone
    assert any(written.token_ids for written in alone)
    for task, packed, written in zip(tasks, bins, alone):
        text = list(itertools.takewhile(lambda token: token not in family.media_token_ids, written.token_ids))
        expected = most_likely(model, family, prepared.tiling, packed, task.prompt_ids, text)
        assert text == expected[: len(text)]
        assert written.stopped is (len(written.token_ids) < 6)


def most_likely(model, family, tiling, packed, prompt_ids, made):
    """The most likely token after a prompt, and after each token that was made, by a forward as training does it:
    the sample is the prompt and these tokens, which are its answer."""
    ids = np.concatenate([prompt_ids, made]).astype(np.int32)
    images = [image for image in packed.images if image["first_token"] < len(prompt_ids)]
    sample = replace(
        packed, input_ids=ids, sample_lengths=np.asarray([len(ids)], dtype=np.int32), images=images,
        sample_rules=np.asarray([LossRule.GIVEN], dtype=np.int8), given_mask=np.arange(len(ids)) >= len(prompt_ids),
        trained_tokens=len(made),
    )  # fmt: skip
    rendered = render([sample], Place(0, 0, 0), family, tiling)
    batch = MicroBatch(mask(rendered, family, label_maker("sampled", family), torch.device("cpu")), family)
    inputs = batch.model_inputs(torch.device("cpu"), torch.float32, model.config)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0]
    return logits[len(prompt_ids) - 1 : len(ids)].argmax(1).tolist()
