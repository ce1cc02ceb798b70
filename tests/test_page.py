"""The report's page: its structure, escaping, and what a browser says to it."""

import html.parser
import pathlib

import browser
import numpy as np
import pytest
from matplotlib.figure import Figure

from ensadv.report import drawing, page
from ensadv.report.page import Claim, FigureBlock, Section
from ensadv.report.tables import Row, Table

EVIL = '<script>console.error("evil")</script> & "quotes"'


def table(*rows: Row, header=('system', 'PGD20', 'why'), notes=()) -> Table:
    return Table('table1a', 'Table 1a', header, rows, notes)


def figure_block(**changes) -> FigureBlock:
    figure = Figure((3.3, 1))
    figure.add_subplot().plot(np.arange(3))
    content = {'caption': 'A line.', 'alt': 'a line that rises', 'name': 'figure1'} | changes
    return FigureBlock(drawing.png(figure), **content)


class Parsed(html.parser.HTMLParser):
    """Elements as (path of tags, attributes, text), in order of their ends."""

    VOID = ('meta', 'link', 'img')

    def __init__(self, text: str):
        super().__init__()
        self.elements = []
        self._open = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self._open.append([tag, dict(attrs), ''])
        if tag in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        path = ' '.join(element[0] for element in self._open)
        opened, attributes, text = self._open.pop()
        assert opened == tag
        self.elements.append((path, attributes, text.strip()))

    def handle_data(self, data):
        for element in self._open:
            element[2] += data

    def find(self, tag: str) -> list[tuple[dict, str]]:
        return [(e[1], e[2]) for e in self.elements if e[0].split()[-1] == tag]

    def texts(self, tag: str) -> list[str]:
        return [text for _, text in self.find(tag)]


def render(*blocks: page.Block, **changes) -> Parsed:
    arguments = {'title': 'Report', 'facts': [], 'sections': [Section('One', 'one', blocks)]}
    return Parsed(page.to_html(**(arguments | changes)))


def test_a_page_has_a_title_facts_and_contents_that_lead_to_sections():
    sections = [Section('Table 1', 'table1', []), Section('Claims', 'claims', [])]
    parsed = render(title='My runs', facts=[('runs', '24'), ('date', 'today')], sections=sections)
    assert parsed.texts('title') == parsed.texts('h1') == ['My runs']
    assert parsed.find('html')[0][0] == {'lang': 'en'}
    assert list(zip(parsed.texts('dt'), parsed.texts('dd'), strict=True)) == [
        ('runs', '24'), ('date', 'today'),
    ]  # fmt: skip
    links = [(attributes['href'], text) for attributes, text in parsed.find('a')]
    assert links == [('#table1', 'Table 1'), ('#claims', 'Claims')]
    assert [attributes['id'] for attributes, _ in parsed.find('section')] == ['table1', 'claims']
    assert parsed.texts('h2') == ['Table 1', 'Claims']
    metas = [attributes for attributes, _ in parsed.find('meta')]
    assert {'name': 'viewport', 'content': 'width=device-width, initial-scale=1'} in metas
    (icon,) = (attributes for attributes, _ in parsed.find('link'))
    assert icon == {'rel': 'icon', 'href': 'data:,'}


def test_blocks_come_in_order():
    parsed = render('first', ['second', 'third'], [], '', 'fourth')
    assert parsed.texts('section')[0].split() == ['One', 'first', 'second', 'third', 'fourth']


def test_a_table_has_a_caption_scopes_kinds_and_notes():
    rows = (
        Row(('SingleAdv', '43.0', 'best')),
        Row(('current iterate', '44.0', ''), 'secondary'),
        Row(('the paper', '43', ''), 'paper'),
        Row(('WRN-28-10', '43', ''), 'paper'),
    )
    parsed = render(table(*rows, notes=('ε = 8/255.',)))
    assert parsed.texts('caption') == ['Table 1a']
    heads = [(attributes['scope'], text) for attributes, text in parsed.find('th')]
    assert heads == [
        ('col', 'system'), ('col', 'PGD20'), ('col', 'why'),
        ('row', 'SingleAdv'), ('row', 'current iterate'), ('row', 'the paper'),
        ('row', 'WRN-28-10paper'),  # where the cell does not say so, a mark does
    ]  # fmt: skip
    kinds = [attributes.get('class') for attributes, _ in parsed.find('tr')]
    assert kinds == [None, None, 'secondary', 'paper', 'paper']
    assert 'ε = 8/255.' in parsed.texts('li')
    assert 'table1a' in [attributes.get('id') for attributes, _ in parsed.find('div')]


@pytest.mark.parametrize(
    'cells, numeric',
    [
        (('43.0', '52.1 ± 0.3', '41 (40–42)*'), True),
        (('+1.2 [−0.3, +2.1]', '−3', '-4', '<0.001', '≥ 5', '[1, 2]', '1,024', '.5'), True),
        (('–', '-', '', 'n/a', '7'), True),
        (('43.0', 'yes'), False),
        (('-O2', '5'), False),
        ((), False),
    ],
)
def test_columns_of_numbers_are_known(cells, numeric):
    block = table(*(Row(('name', cell)) for cell in cells), header=('a', 'b'))
    assert block.numeric == [False, numeric]
    classes = [attributes.get('class') for attributes, _ in render(block).find('th')[:2]]
    assert classes == [None, 'number' if numeric else None]


def test_a_figure_is_inside_of_the_page_with_its_caption():
    parsed = render(figure_block())
    (image, _), (figure, text) = parsed.find('img')[0], parsed.find('figure')[0]
    assert image['src'].startswith('data:image/png;base64,iVBOR')
    assert image['alt'] == 'a line that rises'
    # 660 x 200 dots, shown at 0.62 CSS pixels each.
    assert (image['width'], image['height']) == ('409', '124')
    assert figure['id'] == 'figure1'
    assert text == 'A line.'


@pytest.mark.parametrize('verdict', page.VERDICTS)
def test_a_claim_says_its_verdict(verdict):
    parsed = render(Claim('Ensembles help.', verdict, ['+3 points']))
    assert verdict in parsed.texts('span')
    assert verdict.replace(' ', '-') in parsed.find('div')[-1][0]['class'].split()
    assert parsed.texts('li')[-1] == '+3 points'


def test_markdown_has_every_kind_of_block():
    blocks = [
        'A paragraph.',
        ['first', '* second'],
        '',
        table(Row(('SingleAdv', '43.0', 'a|b')), notes=('n = 9.',)),
        figure_block(),
        Claim('Ensembles help.', 'supported', ['+3 points']),
    ]
    text = page.to_markdown('Runs', [('Data', 'digits')], [Section('One', 'one', blocks)])
    expected = r"""# Runs

- Data: digits

## One

A paragraph.

- first
- \* second

### Table 1a

| system    | PGD20 |  why |
| --------- | ----: | ---: |
| SingleAdv |  43.0 | a\|b |

- n = 9.

![a line that rises](figure1.png)

A line.

Ensembles help: **supported**

- +3 points
"""
    assert text == expected


@pytest.fixture(scope='module')
def full() -> str:
    """A page with every kind of block, and markup in every text."""
    rows = (Row((EVIL, '43.0', EVIL)), Row((EVIL, '1', ''), 'paper'))
    blocks = [
        EVIL,
        [EVIL],
        Table('table1a', EVIL, ('a', 'b', EVIL), rows, (EVIL,)),
        # Wider than a phone's screen.
        table(Row(('x' * 40,) * 9), header=('y' * 20,) * 9),
        figure_block(caption=EVIL, alt=EVIL),
        Claim(EVIL, 'supported', [EVIL]),
    ]
    return page.to_html(EVIL, [(EVIL, EVIL)], [Section(EVIL, 'one', blocks)])


def test_all_text_is_escaped(full):
    assert '<script' not in full
    parsed = Parsed(full)
    for tag in ('title', 'h1', 'dt', 'dd', 'a', 'h2', 'p', 'caption', 'td', 'figcaption'):
        assert any(EVIL in text for text in parsed.texts(tag)), tag
    assert parsed.find('img')[0][0]['alt'] == EVIL


def test_nothing_is_asked_of_the_network_by_the_looks_of_it(full):
    assert 'http' not in full
    for path, attributes, _ in Parsed(full).elements:
        for name in ('src', 'href'):
            assert attributes.get(name, '#').startswith(('#', 'data:')), path


needs_browser = pytest.mark.skipif(browser.find() is None, reason='no Chromium')


@needs_browser
def test_a_browser_finds_nothing_wrong(full, tmp_path):
    path = tmp_path / 'report.html'
    path.write_text(full, encoding='utf-8')
    assert browser.problems(path) == []


@needs_browser
def test_the_browser_would_find_what_is_wrong(tmp_path):
    """The check above can fail."""
    path = pathlib.Path(tmp_path) / 'bad.html'
    path.write_text(
        '<!doctype html><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,"><link rel="stylesheet" href="style.css">'
        '<img src="http://example.invalid/x.png"><div style="width: 2000px">wide</div>'
        '<script>console.error("bad"); console.warn("so so"); console.log("all right")</script>'
        '<script>nonsense()</script>'
    )
    found = browser.problems(path)
    for expected in (
        'console: error: bad',
        'console: warning: so so',
        'request: http://example.invalid/x.png',
        f'request: {(tmp_path / "style.css").as_uri()}',
    ):
        assert expected in found
    assert any(line.startswith('exception: ') and 'nonsense' in line for line in found)
    assert any(line.startswith('wide: ') for line in found)
    assert not any('all right' in line for line in found)
