"""docs/settings.md is what the settings classes say."""

from pathlib import Path

from mmray.config.job import Job
from mmray.config.reference import settings_page

PAGE = Path(__file__).parents[2] / "docs/settings.md"


def test_the_page_is_written_anew_with_every_change_of_a_setting():
    assert PAGE.read_text(encoding="utf-8") == settings_page(), "mmray schema --markdown > docs/settings.md"


def test_every_setting_of_every_group_has_its_meaning():
    page = settings_page()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [line for line in rows if line.rsplit(" | ", 1)[1].strip("| ") == ""] == []
    names = {line.split("`")[1] for line in rows}
    for group in [Job.model_json_schema(), *Job.model_json_schema()["$defs"].values()]:
        assert set(group.get("properties", {})) <= names
