"""Prints a bin in the terminal: counts, a table of its samples, and their text, turn by turn.

Trained text is green, other text dim, tokens of images magenta; the role of a turn is in the margin. Without colours (a
pipe, a file, NO_COLOR) trained text is in ⟦white brackets⟧ instead. Text of the data is printed as text, never as
markup and never as control characters of the terminal.
"""

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from mmray.base.visible import visible
from mmray.inspect.view import BinView, Mark, Piece, SampleView, Turn

STYLES = {Mark.TRAINED: "green", Mark.CONTEXT: "dim", Mark.MEDIA: "magenta"}
ROLE_STYLES = ("yellow", "blue", "cyan", "red")
"""Styles of the roles in order of their boundaries; further roles use them again from the first."""
OPEN, CLOSE = "⟦", "⟧"
_BRACKETS_AS_TEXT = str.maketrans({OPEN: r"\u27e6", CLOSE: r"\u27e7"})


def print_view(console: Console, view: BinView) -> None:
    """Print a bin; without turns, only its counts."""
    console.print(_head(view, is_plain(console)))
    if view.problem:
        console.print(_plain(view.problem, "bold red"))
    console.print()
    console.print(_table(view))
    for number, sample in enumerate(view.samples):
        console.print()
        print_sample(console, f"sample {number} of {len(view.samples)}: {sample.id}", sample, view.roles)


def print_sample(console: Console, title: str, sample: SampleView, roles: tuple[str, ...]) -> None:
    """Print one sample under its title: the place of its row, its images, its text turn by turn."""
    console.print(Rule(_plain(title, "bold"), align="left", style="none"))
    console.print(_plain(f"from {sample.source}"), soft_wrap=True)
    for place, image in enumerate(sample.images):
        name = "bytes" if image["uri"] is None else image["uri"]
        console.print(_plain(f"image {place}: {name} ({image['width']} x {image['height']})"), soft_wrap=True)
    if sample.turns:
        console.print(_text(sample, roles, is_plain(console)))


def is_plain(console: Console) -> bool:
    """True when the console has no colours."""
    return console.color_system is None or console.no_color


def _head(view: BinView, plain: bool) -> Table:
    """The counts of the whole bin, and the legend."""
    used = {
        "tokens": (view.num_tokens, view.token_capacity),
        "visual": (view.visual_tokens, view.visual_capacity),
        "trained": (view.trained_tokens, view.num_tokens),
    }
    head = Table.grid(padding=(0, 2, 0, 0))
    head.add_row("bin", _plain(f"{view.index} of {view.num_bins:,}   bucket {view.bucket}"))
    for name, (count, whole) in used.items():
        head.add_row(name, f"{count:,} of {whole:,} ({count / whole:.1%})")
    head.add_row("loss", _plain(view.loss))
    if any(sample.turns for sample in view.samples):
        head.add_row("legend", legend(plain))
    return head


def legend(plain: bool) -> Text:
    """The legend of the colours, or of the marks without colours."""
    words = {
        Mark.TRAINED: f"{OPEN}trained{CLOSE}" if plain else "trained",
        Mark.CONTEXT: "not trained",
        Mark.MEDIA: "[n × media]",
    }
    text = Text()
    for mark, word in words.items():
        text.append(word, "" if plain else STYLES[mark]).append("   ")
    return text.append("↵ line break")


def _table(view: BinView) -> Table:
    """The table of samples, with trained tokens when they are known."""
    knows_trained = all(sample.trained is not None for sample in view.samples)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("sample", "tokens", "of images", *(("trained",) if knows_trained else ())):
        table.add_column(name, justify="right")
    table.add_column("loss on")
    table.add_column("id", overflow="fold")
    for number, sample in enumerate(view.samples):
        counts = [number, sample.num_tokens, sample.image_tokens, sample.trained]
        numbers = [f"{count:,}" for count in counts if count is not None]
        table.add_row(*numbers, sample.rule, _plain(sample.id))
    return table


def _text(sample: SampleView, roles: tuple[str, ...], plain: bool) -> Table:
    """The turns of a sample, one below the other, with their roles in the margin."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, max_width=16)
    table.add_column(overflow="fold")
    for turn in sample.turns:
        style = "none" if turn.role is None else f"bold {ROLE_STYLES[roles.index(turn.role) % len(ROLE_STYLES)]}"
        table.add_row(_plain(turn.role or "", style), turn_text(turn, plain=plain))
    return table


def turn_text(turn: Turn, *, plain: bool) -> Text:
    """The text of a turn, in colours or, when plain, with trained text in brackets."""
    text = Text()
    for mark, pieces in turn.stretches:
        words = _joined(pieces)
        if not plain:
            text.append(words, STYLES[mark])
        elif mark is Mark.TRAINED:
            inside = words.removesuffix("\n")
            text.append(f"{OPEN}{inside.translate(_BRACKETS_AS_TEXT)}{CLOSE}{words[len(inside) :]}")
        else:
            text.append(words.translate(_BRACKETS_AS_TEXT))
    if text.plain.endswith("\n"):
        text.right_crop(1)  # the next turn begins on a line of its own
    return text


def _joined(pieces: list[Piece]) -> str:
    return "".join(visible(piece.label) for piece in pieces)


def _plain(text: str, style: str = "") -> Text:
    return Text(visible(text), style=style)
