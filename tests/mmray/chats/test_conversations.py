"""Every conversation of the shared data under every chat template and loss: right by its words, or rightly refused."""

import pytest

from mmray.rows.sample import RejectedRow
from tests.mmray.chats import table
from tests.mmray.chats.oracle import (
    LOSSES,
    PUBLISHED,
    SHARED,
    conversations,
    expected_words,
    family_with,
    is_rightly_refused,
    own_templates,
    preparation_of,
    trained_text,
)

pytestmark = pytest.mark.skipif(not (SHARED / "conversations.jsonl").exists(), reason="the shared data is not here")

OUTCOMES: table.Outcomes = {}


def check(family, name, mode):
    """The outcome of each row: "right", or why it is refused. Fails for a row that is wrong."""
    preparation = preparation_of(family, LOSSES[mode])
    outcomes = {}
    for row in conversations():
        found = trained_text(preparation, row)
        if row["trained_words"] is None:
            assert isinstance(found, RejectedRow), row["id"]
            assert (found.reason, "'sentiment'" in found.message) == ("unknown_field", True)
            outcomes[row["id"]] = "refused: `unknown_field`"
            continue
        if isinstance(found, RejectedRow):
            why = is_rightly_refused(family, row)
            assert why is not None, (name, mode, row["id"], found.reason, found.message)
            assert found.reason in ("template", "not_written", "unknown_field"), (name, mode, row["id"], found)
            outcomes[row["id"]] = f"refused: {why}"
            continue
        trained, untrained = expected_words(row, mode)
        assert {word for word in trained if word not in found} == set(), (name, mode, row["id"], found)
        assert {word for word in untrained if word in found} == set(), (name, mode, row["id"], found)
        outcomes[row["id"]] = "right"
    return outcomes


@pytest.mark.parametrize("template", list(PUBLISHED))
def test_published_templates(zoo_processor, template):
    member = PUBLISHED[template]
    family = family_with(zoo_processor(member), member, template)
    outcomes = {mode: check(family, template, mode) for mode in LOSSES}
    assert len({tuple(sorted(each.items())) for each in outcomes.values()}) == 1  # the same rows in every mode
    OUTCOMES[template] = outcomes["sampled"]
    always = {"plain", "parts"} - ({"plain"} if template == "ax_pixtral" else set())  # which writes no system message
    assert {row for row in always if outcomes["sampled"][row] != "right"} == set()


@pytest.mark.parametrize("member", own_templates())
def test_templates_of_the_zoo(zoo_processor, member):
    family = family_with(zoo_processor(member), member, None)
    for mode in LOSSES:
        check(family, member, mode)


def test_the_table_in_the_docs(request):
    if set(OUTCOMES) != set(PUBLISHED):
        pytest.skip("not all templates ran")
    written = table.render(OUTCOMES)
    if request.config.getoption("write_chat_table"):
        table.write(written)
    assert table.in_docs() == written, "pytest tests/mmray/chats --write-chat-table writes it"
