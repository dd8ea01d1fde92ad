"""The help pages of commands: each value has a name, and an option without a value shows none."""

from typing import Any

from typer.core import TyperArgument, TyperCommand, TyperGroup


def _without_types(params: list[Any]) -> list[Any]:
    """Removes the types that typer would show of options without a value (`<bool>`), and beside arguments' names."""
    for param in params:
        if isinstance(param, TyperArgument):
            param.display_type_rich = lambda ctx: None  # type: ignore[method-assign]
        elif getattr(param, "is_flag", False):
            param.metavar = ""
    return params


class PlainCommand(TyperCommand):
    """A command whose help is its docstring, with each paragraph in one line for the terminal to break."""

    def __init__(self, *arguments: Any, help: str | None = None, **options: Any) -> None:
        paragraphs = (" ".join(paragraph.split()) for paragraph in (help or "").split("\n\n"))
        super().__init__(*arguments, help="\n\n".join(paragraphs) or None, **options)

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))


class PlainGroup(TyperGroup):
    """The commands of a program."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))
