"""The report as one HTML document that needs nothing else: no network, no script."""

import base64
import dataclasses
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import jinja2

from ensadv.report.tables import Table

VERDICTS = ('supported', 'not supported', 'too little data')
_PIXELS_PER_INCH = 200  # of the figures
_SHOWN_PER_INCH = 124  # CSS pixels, so that the figures' 7 points read as 9
# A number, perhaps signed or bounded, or what stands for one that is missing.
_NUMBER = re.compile(r'\s*([-+−±×<>≤≥~≈[(]*\s*[.\d]|([-–—?]|n/a)?\s*$)')


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    paragraph: str


@dataclasses.dataclass(frozen=True)
class Items:
    """A list."""

    items: Sequence[str]


@dataclasses.dataclass(frozen=True)
class TableBlock:
    """A table; its name is its anchor."""

    table: Table

    @property
    def numeric(self) -> list[bool]:
        """Whether a column's cells, those of the paper and missing ones among them, are numbers."""
        columns = zip(*(row.cells for row in self.table.rows), strict=True)
        found = [all(_NUMBER.match(cell) for cell in column) for column in columns]
        return found or [False] * len(self.table.header)


@dataclasses.dataclass(frozen=True)
class FigureBlock:
    """A figure.

    Attributes:
      png: the image, at 200 dots per inch of the printed figure.
      caption: written beneath.
      alt: what it shows, for those who do not see it.
      name: its anchor.
    """

    png: bytes
    caption: str
    alt: str
    name: str

    @property
    def source(self) -> str:
        """The image as a data: URI."""
        return 'data:image/png;base64,' + base64.b64encode(self.png).decode()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height on the screen, in CSS pixels."""
        # A PNG's first chunk begins with them.
        width, height = struct.unpack('>II', self.png[16:24])
        scale = _SHOWN_PER_INCH / _PIXELS_PER_INCH
        return round(width * scale), round(height * scale)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim and what the data say of it.

    Attributes:
      statement: the claim.
      verdict: one of VERDICTS.
      details: the evidence, a sentence or more each.
    """

    statement: str
    verdict: str
    details: Sequence[str]


Block = Text | Items | TableBlock | FigureBlock | Claim


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page, under a heading and in the contents.

    Attributes:
      title: the heading.
      anchor: its name in links.
      blocks: from the top.
    """

    title: str
    anchor: str
    blocks: Sequence[Block]


def render(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """Returns the page.

    Args:
      title: its heading, and the window's.
      facts: (what, value) pairs beneath it, as the date.
      sections: from the top. All text is plain: what looks like markup is shown as it is.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests['kind'] = lambda block, name: type(block).__name__ == name
    return environment.get_template('page.html').render(title=title, facts=facts, sections=sections)
