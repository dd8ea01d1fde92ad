"""`Reader`: greedy, as transformers itself would, ended by the tokens that end turns and documents in training."""

import pytest
import torch

from mmray.run.evaluation import Reader
from mmray.run.export import export_model
from tests.mmray.run.export.cases import QUESTION
from tests.mmray.run.export.conftest import trained


@pytest.fixture(scope="module")
def case(make_case):
    case = make_case("qwen2_vl", 0, "fp32")
    trained({1: [case]})
    return case


@pytest.fixture(scope="module")
def reader(case, tmp_path_factory):
    return Reader(export_model(str(case.run), str(tmp_path_factory.mktemp("reader") / "out")).folder)


def greedy(reader, inputs, count):
    """One token after another, without a cache: the most likely one each time."""
    ids, made = inputs["input_ids"], []
    for _ in range(count):
        rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        if "mm_token_type_ids" in rest:
            types = rest["mm_token_type_ids"]
            rest["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, ids.shape[1] - types.shape[1]))
        with torch.no_grad():
            logits = reader.model(input_ids=ids, use_cache=False, **rest).logits[0, -1]
        made.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([[made[-1]]])], dim=1)
    return made


def test_it_writes_the_most_likely_tokens(reader, case):
    page = str(case.prepared.parent / "wide.png")
    for prompt in ({"text": "<image>\nTotal"}, {"messages": [QUESTION]}):
        expected = greedy(reader, reader.prompt(**prompt, images=[page]), 5)
        stops = [k for k, token in enumerate(expected) if token in reader.stop_token_ids]
        expected = expected[: stops[0]] if stops else expected
        assert reader.read(**prompt, images=[page], max_new_tokens=5) == reader.prompt.decode(torch.tensor(expected))


def test_it_stops_where_training_ended_turns_and_documents(reader, case):
    """A head that says one token whatever comes: each that ends something, and one that does not."""
    tokenizer = reader.prompt.family.tokenizer
    ends = {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id}
    assert ends <= set(reader.stop_token_ids)
    page = str(case.prepared.parent / "wide.png")
    word = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    for token, expected in [*((end, "") for end in ends), (word, "aaa")]:
        always = reader.model.lm_head.register_forward_hook(
            lambda module, inputs, output, token=token: torch.nn.functional.one_hot(
                torch.full(output.shape[:-1], token), output.shape[-1]
            ).float()
        )
        try:
            assert reader.read("<image>\nTotal", [page], max_new_tokens=3) == expected
        finally:
            always.remove()
