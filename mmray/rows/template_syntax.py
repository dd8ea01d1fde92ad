"""Reads the syntax of a chat template: the texts with which it compares what people wrote."""

from collections.abc import Iterator
from typing import Any

import jinja2
from jinja2 import nodes


class GenerationBlocks(jinja2.ext.Extension):
    """Makes jinja2 parse `{% generation %}` blocks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        number = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=number)


_TEXT_METHODS = ("split", "rsplit", "startswith", "endswith", "replace", "find", "index", "count", "partition")


def texts_looked_for(syntax: nodes.Template) -> Iterator[str]:
    """Yields the constant texts with which a template compares texts."""
    for call in syntax.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in _TEXT_METHODS:
            for argument in call.args:
                yield from (constant.value for constant in _constants(argument))
    for compare in syntax.find_all(nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in compare.ops):
            yield from (constant.value for constant in _constants(compare.expr))


def _constants(node: nodes.Node) -> Iterator[nodes.Const]:
    if isinstance(node, nodes.Const):
        yield from (node,) if isinstance(node.value, str) else ()
    for inner in node.find_all(nodes.Const):
        if isinstance(inner.value, str):
            yield inner
