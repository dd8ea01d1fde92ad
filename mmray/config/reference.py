"""Every setting of the job file on one page, generated from the settings classes.

`mmray schema --markdown` prints the page, docs/settings.md holds it, and a test compares the two: a setting cannot be
added, renamed or changed without the page saying so.
"""

import json
from collections.abc import Iterator
from typing import Any

from mmray.config.job import Job

_HEAD = """# Settings

Every setting of the job file, with its default and its meaning. Written by `mmray schema --markdown`; `mmray schema`
prints the same as JSON Schema, for editors. Unknown keys are errors. [jobs.md](jobs.md) says how to begin.
"""

_LIMITS = {"exclusiveMinimum": "> {}", "minimum": "≥ {}", "exclusiveMaximum": "< {}", "maximum": "≤ {}"}

Node = dict[str, Any]


def settings_page() -> str:
    """Return the page in Markdown: a section for each group of settings, in the order of the job file."""
    schema = Job.model_json_schema()
    sections = list(_groups(schema, schema, ""))
    return _HEAD + "".join(f"\n{_section(schema, path, group)}" for path, group in sections)


def _groups(schema: Node, group: Node, path: str) -> Iterator[tuple[str, Node]]:
    """Yield each group once, with its path in the job file; `data.train[]` are the entries of a list."""
    yield path, group
    listed = set()
    for name, setting in group["properties"].items():
        for reference, within in _references(setting):
            if reference not in listed:
                listed.add(reference)
                yield from _groups(schema, _resolved(schema, reference), f"{path}.{name}{within}".lstrip("."))


def _references(setting: Node, within: str = "") -> Iterator[tuple[str, str]]:
    """Yield the groups a setting may hold, each with `[]` for every list or mapping that it lies in."""
    if "$ref" in setting:
        yield setting["$ref"], within
    for kind in _kinds(setting):
        yield from _references(kind, within)
    if isinstance(entries := setting.get("items") or setting.get("additionalProperties"), dict):
        yield from _references(entries, f"{within}[]")
    for entries in setting.get("prefixItems", ()):
        yield from _references(entries, f"{within}[]")


def _section(schema: Node, path: str, group: Node) -> str:
    lines = [f"## {f'`{path}`' if path else 'The job'}", "", _text(group.get("description", "")), ""]
    lines += ["| setting | value | default | meaning |", "| --- | --- | --- | --- |"]
    for name, setting in group["properties"].items():
        meaning = setting.get("description") or _description_inside(schema, setting)
        default = "required" if name in group.get("required", ()) else _default(setting.get("default"))
        lines.append(f"| `{name}` | {_cell(_type(setting))} | {default} | {_cell(_text(meaning))} |")
    return "\n".join(lines) + "\n"


def _description_inside(schema: Node, setting: Node) -> str:
    return next((_resolved(schema, ref).get("description", "") for ref, _ in _references(setting)), "")


def _default(value: Any) -> str:
    """Return a default as JSON; groups of settings show theirs in sections of their own."""
    return "see below" if isinstance(value, dict) and value else f"`{json.dumps(value, ensure_ascii=False)}`"


def _type(setting: Node) -> str:
    if kinds := _kinds(setting):
        return " or ".join(dict.fromkeys(_type(kind) for kind in kinds))
    if "$ref" in setting:
        return "settings"
    if "enum" in setting or "const" in setting:
        return ", ".join(f"`{value}`" for value in setting.get("enum", [setting.get("const")]))
    if setting.get("type") == "array":
        entries = setting.get("prefixItems")
        if entries:
            return f"[{', '.join(_type(entry) for entry in entries)}]"
        return f"list of {_type(setting['items'])}" if setting.get("items") else "list"
    limits = [text.format(f"{setting[key]:g}") for key, text in _LIMITS.items() if key in setting]
    names = {"object": "mapping", "string": "text", "boolean": "true, false"}
    kind = str(setting.get("type", "any value"))
    return " ".join([names.get(kind, kind), *limits])


def _kinds(setting: Node) -> list[Node]:
    """Return the schemas of the kinds that a value may have."""
    kinds: list[Node] = [kind for key in ("anyOf", "oneOf", "allOf") for kind in setting.get(key, ())]
    return kinds


def _resolved(schema: Node, reference: str) -> Node:
    group: Node = schema["$defs"][reference.rsplit("/", 1)[1]]
    return group


def _text(description: str) -> str:
    return " ".join(description.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
