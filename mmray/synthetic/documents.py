"""The texts of synthetic pages: invoices, receipts, timetables, forms and labels, from templates.

A small vocabulary in a strict order, so that a model trained from scratch for a minute shows that it learns:
the templates first (the loss of most tokens goes to nearly zero), then sums, names and numbers, which only
the picture tells. Document i of a seed is the same however many are made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

_NAMES = ("Anna Berg", "Bruno Costa", "Clara Diaz", "David Evans", "Emma Fischer", "Farid Gomez")
_STREETS = ("Mill Lane", "Station Road", "Park Street", "Harbour Square")
_TOWNS = ("Ashford", "Brookfield", "Clayton", "Dunmore", "Easton")
_SHOPS = ("CORNER SHOP", "GREEN MARKET", "BOOKS AND PAPER")
_ITEMS = ("lamp", "chair", "paper", "pencil", "teapot", "notebook", "basket", "candle")
_MONTHS = ("January", "March", "May", "July", "September", "November")


@dataclass(frozen=True)
class Document:
    """The content of one page.

    kind: "invoice", "receipt", "timetable", "form" or "label".
    lines: the printed text, (left, right) of each line; right is "" where the line has one part.
    facts: questions that the page answers, with the answers.
    """

    kind: str
    lines: tuple[tuple[str, str], ...]
    facts: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """The transcript: lines joined by newlines, the parts of a line by one space."""
        return "\n".join(f"{left} {right}".rstrip() for left, right in self.lines)


def make_document(seed: int, index: int, split: str = "train") -> Document:
    """Document `index` of a seed; kinds alternate. Another `split` (held-out rows) has other documents."""
    template = _TEMPLATES[index % len(_TEMPLATES)]
    return template(Random(f"mmray/{seed}/{split}/{index}"))


def sample_texts(num_documents: int = 200, seed: int = 0) -> list[str]:
    """Transcripts, questions and answers of training documents: enough to train a small tokenizer on."""
    documents = [make_document(seed, index) for index in range(num_documents)]
    facts = [f"{question} {answer}" for document in documents for question, answer in document.facts]
    return [document.text for document in documents] + facts


def _invoice(random: Random) -> Document:
    number, date, name = _number(random), _date(random), random.choice(_NAMES)
    items, total = _items(random, 3, 6)
    lines = (
        ("INVOICE", f"No. {number}"),
        ("Date:", date),
        ("To:", name),
        ("Address:", f"{random.choice(_STREETS)} {random.randint(1, 9)}"),
        ("Town:", random.choice(_TOWNS)),
        *items,
        ("Total", total),
        ("Please pay within 30 days.", ""),
    )
    facts = (
        ("What is the total?", total),
        ("Who is the invoice for?", name),
        ("What is the number?", number),
    )
    return Document("invoice", lines, facts)


def _receipt(random: Random) -> Document:
    shop = random.choice(_SHOPS)
    items, total = _items(random, 5, 8)
    lines = ((shop, ""), (_date(random), ""), *items, ("Total", total), ("Thank you!", ""))
    return Document("receipt", lines, (("What is the total?", total), ("Which shop is it?", shop)))


def _timetable(random: Random) -> Document:
    start = random.choice(_TOWNS)
    hours = sorted(random.sample(range(6, 23), random.randint(4, 7)))
    towns = [town for town in _TOWNS if town != start]
    departures = [(f"{hour:02d}:{random.choice(('05', '20', '45'))}", random.choice(towns)) for hour in hours]
    lines = (
        ("TIMETABLE", f"from {start}"),
        *((f"Train to {town}", f"departs {time}") for time, town in departures),
        ("All trains run daily.", ""),
    )
    facts = (("Where do the trains start?", start), ("When does the first train depart?", departures[0][0]))
    return Document("timetable", lines, facts)


def _form(random: Random) -> Document:
    name, town = random.choice(_NAMES), random.choice(_TOWNS)
    lines = (
        ("REGISTRATION FORM", ""),
        ("Name:", name),
        ("Street:", f"{random.choice(_STREETS)} {random.randint(1, 9)}"),
        ("Town:", town),
        ("Joined:", _date(random)),
        ("Member number:", _number(random)),
        ("I accept the rules.", random.choice(("yes", "no"))),
        ("Signed:", name),
    )
    return Document("form", lines, (("What is the name?", name), ("Which town is it?", town)))


def _label(random: Random) -> Document:
    number = _number(random)
    return Document("label", ((f"No. {number}", ""),), (("What is the number?", number),))


_TEMPLATES: tuple[Callable[[Random], Document], ...] = (_invoice, _receipt, _timetable, _form, _label)


def _items(random: Random, least: int, most: int) -> tuple[list[tuple[str, str]], str]:
    """Lines with prices, and their sum as it is printed."""
    lines, total_cents = [], 0
    for item in random.sample(_ITEMS, random.randint(least, most)):
        count, cents = random.randint(1, 3), random.randrange(50, 1000, 50)
        total_cents += count * cents
        lines.append((f"{count} x {item}", _money(count * cents)))
    return lines, _money(total_cents)


def _money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"


def _number(random: Random) -> str:
    return f"{random.randint(1, 999):04d}"


def _date(random: Random) -> str:
    return f"{random.randint(1, 28)} {random.choice(_MONTHS)} {random.randint(2020, 2026)}"
