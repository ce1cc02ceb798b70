"""docs/results/: its reports can be made again, and what is published of them says the same."""

import itertools
import re
import shutil

import pytest
from conftest import ROOT
from etils import epath

from ensadv.report import paper, write

STUDIES = sorted(path for path in (ROOT / 'docs' / 'results').iterdir() if path.is_dir())
NUMBER = re.compile(r'\d[\d,]*(?:\.\d+)?')
COLUMNS = {'clean': 'clean', 'IFGSM5': 'ifgsm5', 'PGD20': 'pgd20', 'black-box': 'blackbox'}
PAGES = ['README.md', 'docs/results.md']
CONFIGS = [f'configs/{study.name}.py' for study in STUDIES]
by_page = pytest.mark.parametrize('page', PAGES)


def kept(study):
    """Returns the report that is kept of a study."""
    return (study / 'report' / 'report.md').read_text()


def published(page):
    """Returns what a page, or a config's head, says of results."""
    found = r'^(?:##? Results|Expect.*?)\n(.*?)(?=^## Install|^"""|\Z)'
    return re.search(found, (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)[1]


def lines(report):
    """Returns a report's lines, but for the one that has the command."""
    return [line for line in report.splitlines() if not line.startswith('- Made by:')]


def numbers(line):
    """Returns the numbers of a line, each with what its last decimal is worth; 0 of a whole one."""
    found = [text.replace(',', '').partition('.') for text in NUMBER.findall(line)]
    return [
        (float(f'{whole}.{decimals}'), bool(decimals) * 10 ** -len(decimals))
        for whole, _, decimals in found
    ]


def tables(text):
    """Returns the tables of a Markdown text, each as its rows, and each of these by column."""
    found = []
    for block in re.findall(r'(?:^\|.*\n)+', text, re.MULTILINE):
        header, _, *rows = (
            [cell.strip() for cell in line.strip('|').split('|')] for line in block.splitlines()
        )
        found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


@pytest.mark.parametrize('study', STUDIES, ids=lambda path: path.name)
def test_a_report_is_made_again(study, tmp_path):
    copy = tmp_path / study.name
    shutil.copytree(study, copy, ignore=shutil.ignore_patterns('report'))
    write.write(epath.Path(copy))
    before, again = lines(kept(study)), lines(kept(copy))
    blank = lambda line: re.sub(r'[\s-]+', ' ', NUMBER.sub('#', line))
    assert [blank(line) for line in again] == [blank(line) for line in before]
    for made, line in zip(again, before, strict=True):
        for (number, _), (expected, last_decimal) in zip(numbers(made), numbers(line), strict=True):
            # Sums in another order may round the last decimal otherwise.
            assert abs(number - expected) <= 1.01 * last_decimal, line


@by_page
def test_tables_are_of_the_reports(page):
    """A report has a table with these columns and rows, but for the rows with the paper's."""
    known = [table for study in STUDIES for table in tables(kept(study))]
    shown = [table for table in tables(published(page)) if 'what' not in table[0]]
    assert shown
    for table in shown:
        rows = [row for row in table if row.get('system') != "paper's"]
        assert any(
            all(any(row.items() <= other.items() for other in report) for row in rows)
            for report in known
        ), table


def test_the_papers_numbers_are_the_papers():
    pairs = itertools.chain.from_iterable(
        map(itertools.pairwise, tables(published('docs/results.md')))
    )
    its = {above['system']: row for above, row in pairs if row.get('system') == "paper's"}
    assert its
    for system, row in its.items():
        found = {name: row[column] for column, name in COLUMNS.items()}
        expected = {name: f'{100 * paper.TABLE_1A[system][name]:.0f}' for name in found}
        assert found == expected, system


@pytest.mark.parametrize('page', [*PAGES, *CONFIGS])
def test_numbers_in_the_text_are_of_the_reports(page):
    """Each with a decimal, and what a list says of a difference to the letter."""
    reports = ''.join(map(kept, STUDIES))
    blocks = r'^```.*?^```$|^\|.*?$|\]\([^)]*\)'
    text = re.sub(blocks, '', published(page), flags=re.MULTILINE | re.DOTALL)
    assert {n for n in NUMBER.findall(text) if '.' in n} <= set(NUMBER.findall(reports))
    claims = re.findall(r'^- \w+ − \w+: .*$', text, re.MULTILINE)
    assert [line for line in claims if line not in reports.splitlines()] == []
