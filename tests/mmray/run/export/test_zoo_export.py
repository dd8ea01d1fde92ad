"""Every kind of model: exported from ZeRO-3, loaded by transformers alone, prompted as it was trained."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

import mmray
from mmray.families import family_of, load_processor
from mmray.prepared import PreparedDataset
from mmray.run.export import export_model
from tests.mmray.families.zoo import ZOO
from tests.mmray.run.export.cases import CHATS, PAGES, family_for, micro_batch, prepare
from tests.mmray.run.export.conftest import trained

ROWS = {row["id"]: row for row in PAGES + CHATS}
MEMBERS = [name for name, member in ZOO.items() if not member.missing and not member.missing_for_model]


@pytest.fixture(scope="module")
def engines(make_case):
    cases = [make_case(name, 3, "fp32") for name in MEMBERS]
    found = trained({1: cases})
    return {case.member: (case, found[case]) for case in cases}


@pytest.fixture(scope="module")
def exported(engines, tmp_path_factory):
    """The folder of each member."""
    folder = tmp_path_factory.mktemp("exported")
    return {
        name: export_model(str(case.run), str(folder / str(number))).folder
        for number, (name, (case, _)) in enumerate(engines.items())
    }


@pytest.fixture(params=list(ZOO))
def member(request):
    member = ZOO[request.param]
    if request.param not in MEMBERS:
        pytest.skip(f"{member.name} needs {', '.join(member.missing + member.missing_for_model)}")
    return member


def load(folder, member):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", attn_implementation=member.attentions[0])
    return model.eval()


def test_the_logits_are_the_engine_s(member, engines, exported):
    _, engine = engines[member.name]
    model = load(exported[member.name], member)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, engine["weights"][name]), name
    with torch.no_grad():
        logits = model(**engine["inputs"], use_cache=False).logits
    assert (logits - engine["logits"]).abs().max() <= 1e-6 * max(1.0, float(engine["logits"].abs().max()))


def test_a_prompt_is_what_training_made(member, engines, exported, tmp_path):
    """Token ids and pixels of each sample, against bins of one sample each."""
    case, _ = engines[member.name]
    prepared = PreparedDataset(str(prepare(member.name, case.processor, tmp_path / "rows", packed=False)))
    family, prompt = family_for(case, prepared), mmray.prompt(exported[member.name])
    config = load(exported[member.name], member).config
    compared = 0
    for number in range(len(prepared)):
        packed = prepared.bin(number)
        (row_id,) = packed.sample_ids
        row, ids = ROWS[row_id], torch.tensor(packed.input_ids)
        images = [str(tmp_path / "rows" / name) for name in row["images"]]
        if "messages" in row:
            inputs = prompt(messages=row["messages"][:1], images=images)
            start = inputs["input_ids"][0]
            assert torch.equal(start, ids[: len(start)]), family.tokenizer.decode(ids)
            assert prompt.decode(ids[len(start) :]).strip() == "Anna Berg, of course."
        else:
            inputs = prompt(row["text"], images=images)
            assert torch.equal(inputs["input_ids"][0], ids)
        if images:
            made = micro_batch(prepared, family, number).model_inputs(torch.device("cpu"), torch.float32, config)
            for name in member.pixel_names:
                assert torch.equal(inputs[name], made[name]), name
                compared += 1
    assert compared


def test_it_generates(member, exported, engines):
    case, _ = engines[member.name]
    model, prompt = load(exported[member.name], member), mmray.prompt(exported[member.name])
    inputs = prompt("<image>\nTotal", images=[str(case.prepared.parent / "wide.png")])
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert inputs["input_ids"].shape[1] < output.shape[1] <= inputs["input_ids"].shape[1] + 3


def test_the_processor_s_files_are_there_as_they_were(member, engines, exported):
    case, _ = engines[member.name]
    for path in case.processor.iterdir():
        if path.name not in ("config.json",):
            assert (exported_path := (type(path)(exported[member.name]) / path.name)).read_bytes() == path.read_bytes()
            assert exported_path.is_file()
    found = load_processor(exported[member.name])
    assert type(family_of(found, model_type=member.model_type)) is type(
        family_of(load_processor(case.processor), model_type=member.model_type)
    )
