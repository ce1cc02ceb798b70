"""Tables as Markdown, LaTeX and CSV."""

import csv
import io
import re

import pytest

from ensadv.report import tables
from ensadv.report.tables import Row, Table

TABLE = Table(
    'table1a',
    'Table 1a: the last 10 evaluations',
    ('system', 'clean', 'PGD20'),
    (
        Row(('SingleAdv', '82.1 ± 0.3', '43.0*')),
        Row(('current iterate', '', '44.0'), 'secondary'),
        Row(('the paper', '82', '43'), 'paper'),
    ),
    ('ε = 8/255.', '* 3 examples were not attacked.'),
)


def test_markdown_is_aligned():
    assert tables.markdown([['a', 'b'], ['long', '1'], ['c', '12.5']]) == (
        '| a    |    b |\n| ---- | ---: |\n| long |    1 |\n| c    | 12.5 |'
    )
    with pytest.raises(ValueError, match='argument 2'):
        tables.markdown([['a', 'b'], ['c']])


def test_a_markdown_table_has_a_heading_and_notes():
    assert tables.to_markdown(TABLE).replace('\N{NO-BREAK SPACE}', '~') == (
        '## Table 1a: the last 10 evaluations\n'
        '\n'
        '| system            |      clean | PGD20 |\n'
        '| ----------------- | ---------: | ----: |\n'
        '| SingleAdv         | 82.1 ± 0.3 | 43.0* |\n'
        '| ~~current iterate |            |  44.0 |\n'
        '| ~~_the paper_     |       _82_ |  _43_ |\n'
        '\n'
        '- ε = 8/255.\n'
        '- \\* 3 examples were not attacked.\n'
    )
    bare = Table('t', 'T', ('a|b',), (Row(('|',)),))
    assert tables.to_markdown(bare) == '## T\n\n| a\\|b |\n| ---- |\n| \\|   |\n'


def test_latex_by_hand():
    assert tables.to_latex(TABLE) == (
        '% Needs \\usepackage{booktabs}.\n'
        '\\begin{table}\n'
        '\\centering\n'
        '\\caption{Table 1a: the last 10 evaluations}\n'
        '\\label{tab:table1a}\n'
        '\\begin{tabular}{lrr}\n'
        '\\toprule\n'
        'system & clean & PGD20 \\\\\n'
        '\\midrule\n'
        'SingleAdv & 82.1 $\\pm$ 0.3 & 43.0{*} \\\\\n'
        '\\quad current iterate &  & 44.0 \\\\\n'
        '\\quad \\textit{the paper} & \\textit{82} & \\textit{43} \\\\\n'
        '\\bottomrule\n'
        '\\end{tabular}\n'
        '\\par\\smallskip\\raggedright\\footnotesize\n'
        '\\par ε = 8/255.\n'
        '\\par {*} 3 examples were not attacked.\n'
        '\\end{table}\n'
    )


@pytest.mark.parametrize(
    'text,expected',
    [
        ('50% & #1_a', r'50\% \& \#1\_a'),
        ('{$x^2~y}', r'\{\$x\textasciicircum{}2\textasciitilde{}y\}'),
        ('\\input{a}', r'\textbackslash{}input\{a\}'),
        ('<script>|', r'\textless{}script\textgreater{}\textbar{}'),
        ('[1.2, 3.4]*', '{[}1.2, 3.4]{*}'),
        ('A − B: 1 ± 2', r'A $-$ B: 1 $\pm$ 2'),
        ('Müller', 'Müller'),
    ],
)
def test_latex_is_escaped_everywhere(text, expected):
    table = Table('t', text, (text,), (Row((text,)), Row((text,), 'paper')), (text,))
    lines = tables.to_latex(table).splitlines()
    assert lines[3] == rf'\caption{{{expected}}}'
    assert lines[7] == rf'{expected} \\'
    assert lines[9] == rf'{expected} \\'
    assert lines[10] == rf'\quad \textit{{{expected}}} \\'
    assert lines[-2] == rf'\par {expected}'


def test_latex_of_every_printable_character_is_well_formed():
    """Braces and dollars are balanced, and no cell brings a column of its own."""
    text = ''.join(map(chr, range(32, 127))) + ''.join(tables._LATEX)
    latex = tables.to_latex(Table('t', text, (text, text), (Row((text, text), 'paper'),), (text,)))
    bare = re.sub(r'\\.', '', latex)
    depth = 0
    for character in bare:
        depth += (character == '{') - (character == '}')
        assert depth >= 0
    assert depth == 0
    assert bare.count('$') % 2 == 0
    rows = [line for line in latex.splitlines() if line.endswith(r' \\')]
    assert [len(re.findall(r'(?<!\\)&', row)) for row in rows] == [1, 1]
    assert bare.count('%') == 1
    text_mode = re.sub(r'\$[^$]*\$', '', bare)
    assert not set('#^_$').intersection(text_mode)
    assert '~' not in text_mode


def test_csv_reads_back_as_it_was():
    header = ['system', 'n', 'accuracy']
    rows = [['A, "B"', 10_000, 0.1 + 0.2], ['two\nlines', None, 1 / 3]]
    text = tables.to_csv(header, rows)
    assert text.startswith('system,n,accuracy\n"A, ""B""",10000,0.30000000000000004\n')
    assert '\r' not in text
    first, second = list(csv.reader(io.StringIO(text, newline='')))[1:]
    assert first[0] == 'A, "B"'
    assert second[:2] == ['two\nlines', '']
    assert float(second[2]) == 1 / 3


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match='row 1: expected 2 cells, found 1'):
        Table('t', 'T', ('a', 'b'), (Row(('1', '2')), Row(('1',))))
    with pytest.raises(ValueError, match='row 0: expected 2 cells, found 3'):
        tables.to_csv(['a', 'b'], [[1, 2, 3]])
