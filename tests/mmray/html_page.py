"""A web page as tests look at it: its elements, and its pictures decoded."""

import base64
import io
from dataclasses import dataclass, field
from html.parser import HTMLParser

from PIL import Image

VOID = {"meta", "img", "br"}
LOADING = ("src", "href", "srcset", "data", "action", "poster", "background", "xlink:href")
"""Attributes that make a browser fetch something."""


@dataclass
class Element:
    tag: str
    attributes: dict
    parents: tuple = ()
    text: str = ""

    @property
    def classes(self):
        return (self.attributes.get("class") or "").split()

    def is_in(self, name):
        return any(name in parent.classes for parent in self.parents)


@dataclass
class Page(HTMLParser):
    """The elements of a page, in order, each with the text right inside it."""

    html: str
    elements: list = field(default_factory=list)
    declarations: list = field(default_factory=list)

    def __post_init__(self):
        super().__init__()
        self.open = []
        self.feed(self.html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.elements.append(Element(tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        if self.open:
            self.open[-1].text += data

    def of(self, tag, name=None):
        return [each for each in self.elements if each.tag == tag and (name is None or name in each.classes)]

    @property
    def tokens(self):
        return [each for each in self.of("span") if each.is_in("text") and "title" in each.attributes]

    @property
    def pictures(self):
        return [decoded(each.attributes["src"]) for each in self.of("img")]


def decoded(data_uri):
    head, _, data = data_uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def assert_needs_nothing(page: Page) -> None:
    """No script, no style sheet or font of elsewhere, no picture that is not in the page."""
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {each.tag for each in page.elements}
    for each in page.elements:
        assert not [name for name in each.attributes if name.startswith("on")], each
        for name in LOADING:
            assert (
                each.attributes.get(name, "data:").startswith("data:image/jpeg;base64,") or name not in each.attributes
            )
    assert "url(" not in page.html
    assert "@import" not in page.html
