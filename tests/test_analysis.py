"""Two models compared example by example, on ledgers made by hand."""

import json
import subprocess
import sys

import numpy as np
import pytest

from ensadv import analysis
from ensadv.errors import UserError

LABELS = np.array([3, 1, 4, 1, 5], np.int32)


def ledger(labels=LABELS, **correct: str) -> dict[str, np.ndarray]:
    """A ledger from {'pgd5': '11010'}."""
    arrays = {'label': np.asarray(labels, np.int32)}
    for attack, outcomes in correct.items():
        mask = np.array([outcome == '1' for outcome in outcomes])
        margin = np.where(mask, 1, -1).astype(np.float32)
        arrays |= {f'{attack}_correct': mask, f'{attack}_margin': margin}
    return arrays


def written(mask: np.ndarray) -> str:
    assert mask.dtype == bool
    return ''.join('01'[outcome] for outcome in mask.tolist())


def test_examples_are_in_one_of_four_groups():
    comparisons = analysis.compare(ledger(pgd20='11010'), ledger(pgd20='01110'))
    assert list(comparisons) == ['pgd20']
    found = comparisons['pgd20']
    assert written(found.both) == '01010'
    assert written(found.only_first) == '10000'
    assert written(found.only_second) == '00100'
    assert written(found.neither) == '00001'
    assert found.counts == (2, 1, 1, 1)
    assert found.difference == 0
    assert analysis.compare(ledger(a='11100'), ledger(a='10000'))['a'].difference == 40
    assert analysis.compare(ledger(a='10000'), ledger(a='11100'))['a'].difference == -40


def test_every_attack_that_both_have_is_compared():
    first = ledger(clean='11111', pgd500='11000', ifgsm5='11100', is_correct='10000')
    second = ledger(is_correct='00000', pgd500='10100', clean='11110', pgd20='00000')
    first['pgd500_first_fooled'] = second['pgd500_first_fooled'] = np.zeros(5, np.int32)
    comparisons = analysis.compare(first, second)
    assert list(comparisons) == ['clean', 'pgd500', 'is_correct']
    assert comparisons['pgd500'].counts == (1, 1, 1, 2)
    assert comparisons['is_correct'].counts == (0, 1, 0, 4)


def test_the_validation_split_is_left_alone():
    first, second = ledger(clean='11111'), ledger(clean='11110')
    for each, n in ((first, 2), (second, 3)):
        each['validation_label'] = np.zeros(n, np.int32)
        each['validation_clean_correct'] = np.ones(n, bool)
        each['validation_pgd5_correct'] = np.ones(n, bool)
    assert list(analysis.compare(first, second)) == ['clean']


@pytest.mark.parametrize(
    'second,words',
    [
        (ledger(LABELS[:4], pgd5='1111'), 'of other examples: found 5 and 4'),
        (ledger([3, 1, 4, 2, 6], pgd5='11111'), 'of other examples: found 2 of 5 labels'),
        (ledger(pgd20='11111'), 'in common: found pgd5, clean and pgd20'),
        (ledger(), 'in common: found pgd5, clean and none'),
        (ledger(pgd5='1111'), 'of other examples: pgd5: found 5 and 4 for 5 labels'),
    ],
)
def test_ledgers_that_cannot_be_compared_are_refused(second, words):
    with pytest.raises(UserError) as caught:
        analysis.compare(ledger(pgd5='11111', clean='11111'), second)
    assert words in str(caught.value)
    assert '\n' not in str(caught.value)


def test_the_table_has_a_row_for_each_attack():
    first = ledger(clean='11111', pgd500='11000')
    second = ledger(clean='11110', pgd500='10111')
    comparisons = analysis.compare(first, second)
    assert analysis.comparison_table(comparisons, ('A', 'Bee')) == (
        '| attack |  n | both correct | only A | only Bee | neither | A - Bee (points) |\n'
        '| ------ | -: | -----------: | -----: | -------: | ------: | ---------------: |\n'
        '| clean  |  5 |            4 |      1 |        0 |       0 |           +20.00 |\n'
        '| pgd500 |  5 |            1 |      1 |        3 |       0 |           -40.00 |'
    )


def test_large_numbers_are_readable():
    n = 10_000
    arrays = [
        {'label': np.zeros(n, np.int32), 'clean_correct': np.arange(n) < correct}
        for correct in (9401, 9400)
    ]
    table = analysis.comparison_table(analysis.compare(*arrays), ('A', 'B'))
    row = [cell.strip() for cell in table.splitlines()[-1].strip('|').split('|')]
    assert row == ['clean', '10,000', '9,400', '1', '0', '599', '+0.01']


def test_analysis_needs_no_jax():
    program = 'import sys, ensadv.analysis; sys.exit("jax" in sys.modules)'
    subprocess.run([sys.executable, '-c', program], check=True)


def test_attacks_made_otherwise_and_other_data_are_not_compared():
    def made(**settings):
        return ledger(pgd5='11010') | {'pgd5_settings': np.array(json.dumps(settings))}

    same = made(epsilon=0.1, combine='probs')
    assert list(analysis.compare(same, made(epsilon=0.1, combine='logits'))) == ['pgd5']
    with pytest.raises(UserError, match=r'pgd5 with epsilon 0\.1 and 0\.2'):
        analysis.compare(same, made(epsilon=0.2, combine='probs'))
    with pytest.raises(UserError, match='two data sets'):
        analysis.compare(
            same | {'fingerprint': np.array('a')}, same | {'fingerprint': np.array('b')}
        )
