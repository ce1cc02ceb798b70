"""Tables: what they say, and how Markdown, LaTeX and CSV write it. No I/O."""

import csv
import dataclasses
import io
import re
from collections.abc import Iterable, Sequence

# What LaTeX does not print as it is written; it reads UTF-8.
_LATEX = {
    '\\': r'\textbackslash{}',
    '^': r'\textasciicircum{}',
    '~': r'\textasciitilde{}',
    '<': r'\textless{}',
    '>': r'\textgreater{}',
    '|': r'\textbar{}',
    # At the beginning of a row these would be read as arguments of \\ or of a rule.
    '[': '{[}',
    '*': '{*}',
    '\N{MINUS SIGN}': '$-$',
    '\N{PLUS-MINUS SIGN}': r'$\pm$',
    **{character: f'\\{character}' for character in '{}&%$#_'},
}
_INDENT = '\N{NO-BREAK SPACE}' * 2  # which Markdown keeps
# A number, perhaps signed or bounded, or what stands for one that is missing.
_NUMBER = re.compile(r'\s*([-+−±×<>≤≥~≈[(]*\s*[.\d]|([-–—?]|n/a)?\s*$)')


@dataclasses.dataclass(frozen=True)
class Row:
    """A row's cells, and its kind.

    That is '' for ours, 'secondary' for a second reading of the row above, 'paper' for the paper's.
    """

    cells: tuple[str, ...]
    kind: str = ''


@dataclasses.dataclass(frozen=True)
class Table:
    """A table: the name of its file and anchor, as 'table1a', and what is printed, from the top.

    The notes say what the numbers rest on, a sentence or more each.
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        _check_lengths(self.header, [row.cells for row in self.rows])

    @property
    def numeric(self) -> list[bool]:
        """Whether a column's cells, those of the paper and missing ones among them, are numbers."""
        columns = zip(*(row.cells for row in self.rows), strict=True)
        found = [all(_NUMBER.match(cell) for cell in column) for column in columns]
        return found or [False] * len(self.header)


def _check_lengths(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f'row {i}: expected {len(header)} cells, found {len(row)}: {row}')


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows as an aligned Markdown table; the first row is the header."""
    # At least 2, since a rule of a colon alone is none.
    widths = [max(2, *map(len, column)) for column in zip(*rows, strict=True)]
    rules = ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]
    lines = []
    for cells in (rows[0], rules, *rows[1:]):
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        padded[0] = cells[0].ljust(widths[0])
        lines.append(f'| {" | ".join(padded)} |')
    return '\n'.join(lines)


def to_markdown(table: Table, level: int = 2) -> str:
    """Returns a heading, the table and its notes as a list, in GitHub's Markdown.

    Rows of a kind are indented; the paper's are in italics, too. The last line is ended.

    Args:
      table: the table.
      level: of the heading.
    """

    def cells(row: Row) -> list[str]:
        texts = [cell.replace('|', r'\|') for cell in row.cells]
        if row.kind == 'paper':
            # Underscores: a cell may end in an asterisk that refers to a note.
            texts = [f'_{text}_' if text else '' for text in texts]
        if row.kind:
            texts[0] = _INDENT + texts[0]
        return texts

    # The header is a row of no kind.
    text = markdown([cells(row) for row in (Row(table.header), *table.rows)])
    notes = markdown_list(table.notes)
    return '\n'.join(
        [f'{"#" * level} {table.title}', '', text, *([''] if notes else []), *notes, '']
    )


def markdown_list(items: Iterable[str]) -> list[str]:
    """Returns the lines of a list in Markdown."""
    # An item that begins with an asterisk would be a list within the list.
    return ['- ' + re.sub('^[*]', r'\*', item) for item in items]


def to_csv(header: Sequence[str], rows: Sequence[Sequence[str | float | int | None]]) -> str:
    """Returns numbers as CSV (RFC 4180, but lines end in '\\n').

    None is an empty cell; floats are written so that they read back the same.
    """
    _check_lengths(header, rows)
    text = io.StringIO(newline='')
    csv.writer(text, lineterminator='\n').writerows([header, *rows])
    return text.getvalue()


def to_latex(table: Table) -> str:
    """Returns a table environment with booktabs' rules, its caption above and notes beneath.

    Rows of a kind are indented, and the paper's in italics. The last line is ended.
    """

    def line(row: Row) -> str:
        texts = [_escape(cell) for cell in row.cells]
        if row.kind == 'paper':
            texts = [rf'\textit{{{text}}}' if text else '' for text in texts]
        if row.kind:
            texts[0] = rf'\quad {texts[0]}'
        return ' & '.join(texts) + r' \\'

    notes = [rf'\par {_escape(note)}' for note in table.notes]
    lines = [
        r'% Needs \usepackage{booktabs}.',
        r'\begin{table}',
        r'\centering',
        rf'\caption{{{_escape(table.title)}}}',
        rf'\label{{tab:{table.name}}}',
        rf'\begin{{tabular}}{{{"l" + "r" * (len(table.header) - 1)}}}',
        r'\toprule',
        line(Row(table.header)),
        r'\midrule',
        *map(line, table.rows),
        r'\bottomrule',
        r'\end{tabular}',
        *([r'\par\smallskip\raggedright\footnotesize', *notes] if notes else []),
        r'\end{table}',
    ]
    return '\n'.join(lines) + '\n'


def _escape(text: str) -> str:
    return ''.join(_LATEX.get(character, character) for character in text)
