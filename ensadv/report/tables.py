"""Tables: what they say, and how Markdown, LaTeX and CSV write it. No I/O."""

import csv
import dataclasses
import io
import re
from collections.abc import Iterable, Sequence

# Other characters are written as they are: LaTeX reads UTF-8.
_LATEX = {
    '\\': r'\textbackslash{}',
    '{': r'\{',
    '}': r'\}',
    '&': r'\&',
    '%': r'\%',
    '$': r'\$',
    '#': r'\#',
    '_': r'\_',
    '~': r'\textasciitilde{}',
    '^': r'\textasciicircum{}',
    '<': r'\textless{}',
    '>': r'\textgreater{}',
    '|': r'\textbar{}',
    # At the beginning of a row these would be read as arguments of \\ or of a rule.
    '[': '{[}',
    '*': '{*}',
    '\N{NO-BREAK SPACE}': '~',
    '\N{EN DASH}': '--',
    '\N{EM DASH}': '---',
    '\N{MINUS SIGN}': '$-$',
    '\N{PLUS-MINUS SIGN}': r'$\pm$',
    '\N{MULTIPLICATION SIGN}': r'$\times$',
    '\N{MIDDLE DOT}': r'$\cdot$',
    '\N{LESS-THAN OR EQUAL TO}': r'$\leq$',
    '\N{GREATER-THAN OR EQUAL TO}': r'$\geq$',
    '\N{NOT EQUAL TO}': r'$\neq$',
    '\N{ALMOST EQUAL TO}': r'$\approx$',
    '\N{RIGHTWARDS ARROW}': r'$\rightarrow$',
    '\N{INFINITY}': r'$\infty$',
    '\N{SUPERSCRIPT TWO}': r'$^2$',
    '\N{SUBSCRIPT TWO}': r'$_2$',
    '\N{DEGREE SIGN}': r'$^\circ$',
    '\N{SECTION SIGN}': r'\S{}',
    '\N{HORIZONTAL ELLIPSIS}': r'\ldots{}',
    '\N{LEFT SINGLE QUOTATION MARK}': '`',
    '\N{RIGHT SINGLE QUOTATION MARK}': "'",
    '\N{LEFT DOUBLE QUOTATION MARK}': '``',
    '\N{RIGHT DOUBLE QUOTATION MARK}': "''",
    'α': r'$\alpha$',
    'β': r'$\beta$',
    'δ': r'$\delta$',
    'ε': r'$\epsilon$',
    'η': r'$\eta$',
    'θ': r'$\theta$',
    'λ': r'$\lambda$',
    'μ': r'$\mu$',
    '\N{MICRO SIGN}': r'$\mu$',
    'π': r'$\pi$',
    'ρ': r'$\rho$',
    'σ': r'$\sigma$',
    'χ': r'$\chi$',
    'Δ': r'$\Delta$',
    'Σ': r'$\Sigma$',
}
# A hyphen before a number, and not between two words or numbers, is a minus sign.
_MINUS = re.compile(r'(?<![\w)-])-(?=\.?\d)')
_INDENT = '\N{NO-BREAK SPACE}' * 2


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
      cells: one for each column.
      kind: '' for ours, 'secondary' for a second reading of the row above, 'paper' for the
        paper's numbers.
    """

    cells: tuple[str, ...]
    kind: str = ''

    def __post_init__(self):
        if self.kind not in ('', 'secondary', 'paper'):
            raise ValueError(f"kind: expected '', 'secondary' or 'paper', found {self.kind!r}")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
      name: of its file and of its anchor, as in 'table1a'.
      title: one line.
      header: what the columns are.
      rows: from the top.
      notes: what the numbers rest on, a sentence or more each.
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        for i, row in enumerate(self.rows):
            _check_length(row.cells, self.header, f'{self.name}, row {i}')


def _check_length(row: Sequence[object], header: Sequence[str], what: str) -> None:
    if len(row) != len(header):
        raise ValueError(f'{what}: expected {len(header)} cells, found {len(row)}')


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows as an aligned Markdown table; the first row is the header."""
    # At least 2, since a rule of a colon alone is none.
    widths = [max(2, *map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return '| ' + ' | '.join([first, *rest]) + ' |'

    rule = ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]
    return '\n'.join([line(rows[0]), line(rule), *map(line, rows[1:])])


def to_markdown(table: Table) -> str:
    """Returns a heading, the table and its notes as a list, in GitHub's Markdown.

    Rows of a kind are indented, by no-break spaces, which Markdown keeps; the paper's are in
    italics, too.

    Returns:
      Lines, the last of them ended.
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
    # A note that begins with an asterisk would be a list within the list.
    notes = [re.sub('^[*]', r'\*', note) for note in table.notes]
    return '\n'.join(
        [
            f'## {table.title}',
            '',
            text,
            *([''] if notes else []),
            *(f'- {note}' for note in notes),
            '',
        ]
    )


def to_csv(header: Sequence[str], rows: Iterable[Sequence[str | float | int | None]]) -> str:
    """Returns numbers as CSV (RFC 4180, but lines end in '\\n').

    Args:
      header: the columns' names.
      rows: None is an empty cell; floats are written so that they read back the same.

    Raises:
      ValueError: if a row has another number of cells than the header.
    """
    text = io.StringIO(newline='')
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(header)
    for i, row in enumerate(rows):
        _check_length(row, header, f'row {i}')
        writer.writerow(row)
    return text.getvalue()


def to_latex(table: Table) -> str:
    """Returns a table environment with booktabs' rules, its caption above and notes beneath.

    Rows of a kind are indented, and the paper's in italics.

    Returns:
      Lines, the last of them ended.
    """

    def line(row: Row) -> str:
        texts = [_escape_latex(cell) for cell in row.cells]
        if row.kind == 'paper':
            texts = [rf'\textit{{{text}}}' if text else '' for text in texts]
        if row.kind:
            texts[0] = rf'\quad {texts[0]}'
        return ' & '.join(texts) + r' \\'

    notes = [rf'\par {_escape_latex(note)}' for note in table.notes]
    lines = [
        r'% Needs \usepackage{booktabs}.',
        r'\begin{table}',
        r'\centering',
        rf'\caption{{{_escape_latex(table.title)}}}',
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


def _escape_latex(text: str) -> str:
    text = _MINUS.sub('\N{MINUS SIGN}', text)
    # LaTeX would make a dash of two hyphens that touch.
    parts = re.split('(?<=-)(?=-)', text)
    return '{}'.join(''.join(_LATEX.get(c, c) for c in part) for part in parts)
