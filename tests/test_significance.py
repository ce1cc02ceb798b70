"""Comparisons of ledgers, and tests and intervals, against what is worked out by hand."""

import json
import math

import numpy as np
import pytest

from ensadv.errors import UserError
from ensadv.report import comparison, significance

LABELS = np.array([3, 1, 4, 1, 5], np.int32)


def ledger(labels=LABELS, **correct: str) -> dict[str, np.ndarray]:
    """A ledger from {'pgd5': '11010'}."""
    arrays = {'label': np.asarray(labels, np.int32)}
    for attack, outcomes in correct.items():
        mask = np.array([outcome == '1' for outcome in outcomes])
        margin = np.where(mask, 1, -1).astype(np.float32)
        arrays |= {f'{attack}_correct': mask, f'{attack}_margin': margin}
    return arrays


def test_examples_are_in_one_of_four_groups():
    comparisons = comparison.compare(ledger(pgd20='11010'), ledger(pgd20='01110'))
    assert list(comparisons) == ['pgd20']
    found = comparisons['pgd20']
    assert found == (2, 1, 1, 1)
    assert found.difference == 0
    assert comparison.compare(ledger(a='11100'), ledger(a='10000'))['a'].difference == 40
    assert comparison.compare(ledger(a='10000'), ledger(a='11100'))['a'].difference == -40


def test_every_attack_that_both_have_is_compared():
    first = ledger(clean='11111', pgd500='11000', ifgsm5='11100', is_correct='10000')
    second = ledger(is_correct='00000', pgd500='10100', clean='11110', pgd20='00000')
    first['pgd500_first_fooled'] = second['pgd500_first_fooled'] = np.zeros(5, np.int32)
    comparisons = comparison.compare(first, second)
    assert list(comparisons) == ['clean', 'pgd500', 'is_correct']
    assert comparisons['pgd500'] == (1, 1, 1, 2)
    assert comparisons['is_correct'] == (0, 1, 0, 4)


def test_the_validation_split_is_left_alone():
    first, second = ledger(clean='11111'), ledger(clean='11110')
    for each, n in ((first, 2), (second, 3)):
        each['validation_label'] = np.zeros(n, np.int32)
        each['validation_clean_correct'] = np.ones(n, bool)
        each['validation_pgd5_correct'] = np.ones(n, bool)
    assert list(comparison.compare(first, second)) == ['clean']


def test_the_examples_of_an_older_ledger_are_the_first_ones():
    older, newer = ledger(pgd5='11010'), ledger(pgd5='01110')
    newer['index'] = np.arange(5, dtype=np.int32)
    assert comparison.compare(older, newer)['pgd5'] == (2, 1, 1, 1)
    # Their labels are the same by chance.
    newer['index'] = np.array([0, 1, 2, 5, 6], np.int32)
    for pair in ((older, newer), (newer, older)):
        with pytest.raises(UserError, match='of other examples: found 2 of 5 places'):
            comparison.compare(*pair)
    newer['index'] = np.zeros(4, np.int32)
    with pytest.raises(UserError, match='the second of the ledgers: index: expected integers'):
        comparison.compare(older, newer)


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
        comparison.compare(ledger(pgd5='11111', clean='11111'), second)
    assert words in str(caught.value)
    assert '\n' not in str(caught.value)


def test_the_table_has_a_row_for_each_attack():
    first = ledger(clean='11111', pgd500='11000')
    second = ledger(clean='11110', pgd500='10111')
    rows = comparison.table(comparison.compare(first, second)).splitlines()
    cells = [[cell.strip() for cell in row.strip('|').split('|')] for row in rows]
    assert cells[0][3:5] == ['only first', 'only second']
    assert cells[2:] == [
        ['clean', '5', '4', '1', '0', '0', '+20.00'],
        ['pgd500', '5', '1', '1', '3', '0', '-40.00'],
    ]


def test_large_numbers_are_readable():
    n = 10_000
    arrays = [
        {'label': np.zeros(n, np.int32), 'clean_correct': np.arange(n) < correct}
        for correct in (9401, 9400)
    ]
    table = comparison.table(comparison.compare(*arrays))
    row = [cell.strip() for cell in table.splitlines()[-1].strip('|').split('|')]
    assert row == ['clean', '10,000', '9,400', '1', '0', '599', '+0.01']


def test_attacks_made_otherwise_and_other_data_are_not_compared():
    def made(**settings):
        return ledger(pgd5='11010') | {'pgd5_settings': np.array(json.dumps(settings))}

    same = made(epsilon=0.1, combine='probs')
    assert list(comparison.compare(same, made(epsilon=0.1, combine='logits'))) == ['pgd5']
    with pytest.raises(UserError, match=r'pgd5 with epsilon 0\.1 and 0\.2'):
        comparison.compare(same, made(epsilon=0.2, combine='probs'))
    with pytest.raises(UserError, match='two data sets'):
        comparison.compare(
            same | {'fingerprint': np.array('a')}, same | {'fingerprint': np.array('b')}
        )


def made_with(**losses: tuple[str, str]) -> dict[str, np.ndarray]:
    """A ledger from {'pgd20': ('margin', '11010')}; __ stands for the = of a key."""
    arrays = ledger()
    for key, (loss, outcomes) in losses.items():
        key = key.replace('__', '=')
        settings = {'attack': 'pgd', 'steps': 20, 'loss': loss}
        arrays[f'{key}_correct'] = np.array([outcome == '1' for outcome in outcomes])
        arrays[f'{key}_settings'] = np.array(json.dumps(settings))
    return arrays


def test_of_several_settings_each_is_compared_with_its_like():
    first = made_with(pgd20=('margin', '11000'), pgd20_loss__cross_entropy=('entropy', '11110'))
    second = made_with(pgd20=('entropy', '10000'), pgd20_loss__margin=('margin', '11100'))
    found = comparison.compare(first, second)
    assert found == {
        'pgd20, pgd20_loss=margin': (2, 0, 1, 2),
        'pgd20_loss=cross_entropy, pgd20': (1, 3, 0, 1),
    }
    # What one of them has alone is left out.
    one = made_with(pgd20=('margin', '01000'))
    assert list(comparison.compare(first, one)) == ['pgd20']
    assert comparison.compare(first, one)['pgd20'] == (1, 1, 0, 3)
    with pytest.raises(UserError, match='pgd20 with loss margin and entropy'):
        comparison.compare(one, made_with(pgd20=('entropy', '11111')))
    # Of one that was made on fewer examples, the first ones, these are compared.
    fewer = one | {
        'pgd20_correct': np.array([True, True]),
        'pgd20_settings': np.array(
            json.dumps(json.loads(str(one['pgd20_settings'])) | {'examples': 2})
        ),
    }
    assert comparison.compare(fewer, first)['pgd20'] == (2, 0, 0, 0)
    assert comparison.compare(one, fewer)['pgd20'] == (1, 0, 1, 0)
    # Of an older ledger the settings are not known: it is the attack of that key.
    older = {k: v for k, v in one.items() if not k.endswith('_settings')}
    assert list(comparison.compare(first, older)) == ['pgd20']


def table(*rows: str) -> np.ndarray:
    """bool [rows, n] from rows such as '0110'."""
    return np.array([[outcome == '1' for outcome in row] for row in rows])


@pytest.mark.parametrize(
    'only_first,only_second,expected',
    [
        (0, 0, 1),
        (1, 0, 1),  # both outcomes are as unlikely as this one
        (5, 0, 2 / 2**5),
        (0, 5, 2 / 2**5),
        (1, 5, 2 * (1 + 6) / 2**6),
        (6, 2, 2 * (1 + 8 + 28) / 2**8),
        (3, 3, 1),
    ],
)
def test_mcnemar_is_the_exact_binomial_test(only_first, only_second, expected):
    assert significance.mcnemar(only_first, only_second) == pytest.approx(expected, rel=1e-12)


def test_clustered_mcnemar_by_hand():
    # By example: 2 - 0, 1 - 0, 1 - 1, 0 - 1, 2 - 2, 2 - 0, 1 - 0.
    first = table('1110110', '1000111')
    second = table('0011100', '0000100')
    # d = 2, 1, 0, -1, 0, 2, 1: sum 5, sum of squares 11. P(|Z| > z) for Z normal is erfc(z / 2^.5).
    expected = math.erfc(5 / math.sqrt(11) / math.sqrt(2))
    p = significance.clustered_mcnemar(first, second)
    assert p == pytest.approx(expected, rel=1e-12)
    assert p == significance.clustered_mcnemar(second, first)
    assert p == significance.clustered_mcnemar(first[::-1], second)


def test_clustered_mcnemar_does_not_take_the_same_example_for_many():
    # Ten seeds that agree on everything say no more than one of them.
    first, second = table('1' * 9 + '0' * 4), table('0' * 9 + '1' * 4)
    # d is 10 nine times and -10 four times.
    expected = math.erfc(50 / math.sqrt(13 * 100) / math.sqrt(2))
    p = significance.clustered_mcnemar(np.repeat(first, 10, 0), np.repeat(second, 10, 0))
    assert p == pytest.approx(expected, rel=1e-12)
    assert p > 0.1


def test_clustered_mcnemar_of_one_seed_is_exact():
    first, second = table('1111100'), table('0000000')
    assert significance.clustered_mcnemar(first, second) == pytest.approx(2 / 2**5)
    assert significance.clustered_mcnemar(first, first) == 1
    both = np.repeat(first, 2, axis=0)
    assert significance.clustered_mcnemar(both, both) == 1


@pytest.mark.parametrize('shapes', [((2, 5), (3, 5)), ((2, 5), (2, 4)), ((5,), (5,))])
def test_clustered_mcnemar_wants_as_many_seeds_and_examples(shapes):
    with pytest.raises(ValueError, match='two arrays of'):
        significance.clustered_mcnemar(*(np.ones(shape, bool) for shape in shapes))


def test_resampled_examples_are_the_same_for_all_runs():
    # Only one of the first two runs is right on any example, and the third always.
    correct = table('1100000000', '0011111111', '1111111111', '1100000000')
    resampled = significance.resample(correct, num=4000, seed=1)
    assert resampled.shape == (4000, 4)
    np.testing.assert_allclose(resampled[:, 0] + resampled[:, 1], 1, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(resampled[:, 2], 1)
    np.testing.assert_array_equal(resampled[:, 3], resampled[:, 0])
    # Binomial: n = 10, p = 0.2. The standard error of the mean is 0.002, of the variance 2.3 %.
    assert resampled[:, 0].mean() == pytest.approx(0.2, abs=0.008)
    assert resampled[:, 0].var() == pytest.approx(0.2 * 0.8 / 10, rel=0.1)


def test_resampling_in_parts_covers_every_resample(monkeypatch):
    correct = table('1100000000', '0011111111')
    whole = significance.resample(correct, num=25, seed=3)
    monkeypatch.setattr(significance, '_CHUNK', 10 * len(correct[0]))
    np.testing.assert_array_equal(significance.resample(correct, num=25, seed=3), whole)
    monkeypatch.setattr(significance, '_CHUNK', 1)
    np.testing.assert_array_equal(significance.resample(correct, num=25, seed=3), whole)
    assert not np.array_equal(significance.resample(correct, num=25, seed=4), whole)


def test_nothing_cannot_be_resampled():
    with pytest.raises(ValueError, match='at least one example'):
        significance.resample(np.ones((2, 0), bool))
    with pytest.raises(ValueError, match='at least one run'):
        significance.accuracy_interval(np.ones((5, 2)), [])


def test_drawn_seeds_have_the_variance_of_a_mean_of_seeds():
    """By hand: s^2 / S, where S of S draws would give s^2 / S (S - 1) / S."""
    rng = np.random.default_rng(0)
    # Two seeds, 0.4 and 0.6: s^2 = 0.02, and one of them is drawn. The other run is another's.
    resampled = np.tile([0.4, 0.9, 0.6], (20_000, 1))
    drawn = significance.draw_seeds(resampled, [0, 2], rng)
    assert set(drawn.tolist()) == {0.4, 0.6}
    assert drawn.var() == pytest.approx(0.01, rel=0.02)
    # Three: s^2 = 0.09; means of two draws.
    resampled = np.tile([0.0, 0.3, 0.6], (20_000, 1))
    drawn = significance.draw_seeds(resampled, [0, 1, 2], rng)
    assert sorted({round(value, 9) for value in drawn.tolist()}) == [0, 0.15, 0.3, 0.45, 0.6]
    assert drawn.var() == pytest.approx(0.03, rel=0.05)
    # One: nothing is drawn.
    np.testing.assert_array_equal(significance.draw_seeds(resampled, [1], rng), 0.3)


def test_the_variance_over_seeds_is_unbiased():
    """400 studies of four seeds that spread by 0.02: on average 0.02^2 / 4."""
    rng = np.random.default_rng(5)
    variances = []
    for _ in range(400):
        resampled = np.tile(rng.normal(0.5, 0.02, 4), (200, 1))
        variances.append(significance.draw_seeds(resampled, range(4), rng).var())
    # The standard error is sqrt(2 / 3) / 20, about 4 %.
    assert np.mean(variances) == pytest.approx(0.02**2 / 4, rel=0.12)


def test_intervals_by_hand():
    # 0 .. 100 points, in steps of 1, less a constant 20 points.
    resampled = np.stack([np.linspace(0, 1, 101), np.full(101, 0.2)], axis=1)
    assert significance.accuracy_interval(resampled, [0]) == pytest.approx((0.025, 0.975))
    assert significance.difference_interval(resampled, [0], [1]) == pytest.approx((-17.5, 77.5))
    assert significance.difference_interval(resampled, [1], [0]) == pytest.approx((-77.5, 17.5))
    # Seeds of 0.4 and 0.6 against 0.2: either difference is half of the draws.
    resampled = np.tile([0.4, 0.6, 0.2], (1000, 1))
    assert significance.difference_interval(resampled, [0, 1], [2]) == pytest.approx((20, 40))
    assert significance.accuracy_interval(resampled, [0, 1]) == pytest.approx((0.4, 0.6))


def test_systems_draw_their_seeds_independently():
    # Drawn alike, the difference would always be 0.
    resampled = np.tile([0.4, 0.6, 0.4, 0.6], (1000, 1))
    interval = significance.difference_interval(resampled, [0, 1], [2, 3])
    assert interval == pytest.approx((-20, 20))


def test_identical_runs_do_not_differ():
    correct = np.tile(np.random.default_rng(0).random(50) < 0.6, (5, 1))
    resampled = significance.resample(correct, num=500)
    assert significance.difference_interval(resampled, [0], [1]) == (0, 0)
    low, high = significance.difference_interval(resampled, [0, 1, 2], [3, 4])
    assert low == pytest.approx(0, abs=1e-10)
    assert high == pytest.approx(0, abs=1e-10)
    low, high = significance.accuracy_interval(resampled, [0, 1])
    assert high - low > 0.2


def test_pairing_makes_the_interval_of_correlated_runs_narrow():
    """Half are right, and the second is wrong on 20 of the first's besides: by hand."""
    n = 2000
    first = np.arange(n) % 2 == 0
    second = first & (np.arange(n) >= 40)
    resampled = significance.resample(np.stack([first, second]), num=4000)
    low, high = significance.difference_interval(resampled, [0], [1])
    # d is 1 with probability 0.01: its mean's deviation is sqrt(.01 .99 / 2000), 0.22 points.
    assert (low + high) / 2 == pytest.approx(1, abs=0.1)
    assert high - low == pytest.approx(2 * 1.96 * 0.2225, rel=0.1)
    # Unpaired: sqrt(2 .5 .5 / 2000), 1.58 points.
    other = significance.resample(np.stack([first, second]), num=4000, seed=1)
    unpaired = np.stack([resampled[:, 0], other[:, 1]], axis=1)
    low, high = significance.difference_interval(unpaired, [0], [1])
    assert high - low == pytest.approx(2 * 1.96 * 1.58, rel=0.1)


def test_the_interval_covers_the_truth_19_times_in_20():
    """Two networks of unequal accuracy, alike on most examples; new test sets, 400 times."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        draws = rng.random((2, 400))
        # Right on 60 % and .6 .75 + .4 .25 = 55 %.
        first = draws[0] < 0.6
        second = np.where(first, draws[1] < 0.75, draws[1] < 0.25)
        resampled = significance.resample(np.stack([first, second]), num=400, seed=trial)
        low, high = significance.difference_interval(resampled, [0], [1])
        covered += low <= 5 <= high
    # The standard error is 1.1 %; percentiles of 400 draws cost a little.
    assert 0.915 <= covered / 400 <= 0.98
