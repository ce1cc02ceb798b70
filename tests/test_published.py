"""docs/results/: the reports that are kept are those of the results that are kept beside them."""

import re
import shutil

import pytest
from conftest import ROOT
from etils import epath

from ensadv.report import write

STUDIES = sorted(path for path in (ROOT / 'docs' / 'results').iterdir() if path.is_dir())
NUMBER = re.compile(r'\d[\d,]*(?:\.\d+)?')


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


@pytest.mark.parametrize('study', STUDIES, ids=lambda path: path.name)
def test_a_report_is_made_again(study, tmp_path):
    copy = tmp_path / study.name
    shutil.copytree(study, copy, ignore=shutil.ignore_patterns('report'))
    write.write(epath.Path(copy))
    kept = lines((study / 'report' / 'report.md').read_text())
    again = lines((copy / 'report' / 'report.md').read_text())
    blank = lambda line: re.sub(r'[\s-]+', ' ', NUMBER.sub('#', line))
    assert [blank(line) for line in again] == [blank(line) for line in kept]
    for made, line in zip(again, kept, strict=True):
        for (number, _), (expected, last_decimal) in zip(numbers(made), numbers(line), strict=True):
            # Sums in another order may round the last decimal otherwise.
            assert abs(number - expected) <= 1.01 * last_decimal, line
