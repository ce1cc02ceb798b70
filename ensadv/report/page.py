"""The report as one document: HTML that needs nothing else, no network, no script; or Markdown."""

import base64
import dataclasses
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2

from ensadv.report import tables
from ensadv.report.tables import Table

VERDICTS = ('supported', 'not supported', 'too little data')
_PIXELS_PER_INCH = 200  # of the figures
_SHOWN_PER_INCH = 124  # CSS pixels, so that the figures' 7 points read as 9


@dataclasses.dataclass(frozen=True)
class FigureBlock:
    """A figure: a PNG of 200 dots per inch, its caption, what it shows in words, and its anchor."""

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
    """A claim, what the data say of it (one of `VERDICTS`), and the evidence in sentences."""

    statement: str
    verdict: str
    details: Sequence[str]


# A string is a paragraph, and a list of them a list. What is empty is not shown.
Block = str | list[str] | Table | FigureBlock | Claim


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page, under a heading and in the contents; nothing if its blocks are empty."""

    title: str
    anchor: str
    blocks: Sequence[Block]


def to_html(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """Returns the page: title, (what, value) pairs as the date, and sections from the top.

    All text is plain: what looks like markup is shown as it is.
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


def to_markdown(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """Returns the page in GitHub's Markdown; figures are the PNG files that stand beside it."""
    parts = [f'# {title}', _list(f'{what}: {value}' for what, value in facts)]
    for section in sections:
        parts += [f'## {section.title}', *map(_block, filter(None, section.blocks))]
    return '\n\n'.join(part.rstrip('\n') for part in parts if part) + '\n'


def _block(block: Block) -> str:
    match block:
        case str():
            return block
        case Table():
            return tables.to_markdown(block, level=3)
        case FigureBlock():
            return f'![{block.alt}]({block.name}.png)\n\n{block.caption}'
        case Claim():
            return f'{block.statement.rstrip(".")}: **{block.verdict}**\n\n{_list(block.details)}'
        case _:
            return _list(block)


def _list(items: Iterable[str]) -> str:
    return '\n'.join(tables.markdown_list(items))
