"""What is computed from series of evaluations, against arrays worked out by hand."""

import subprocess
import sys

import numpy as np
import pytest

from ensadv.report import analysis

NAN = float('nan')


def equal(found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_a_rolling_median_is_centred_and_shrinks_at_the_ends():
    # Windows 1 5, 1 5 2, 5 2 8, 2 8 3, 8 3.
    equal(analysis.rolling_median([1, 5, 2, 8, 3], window=3), [3, 2, 5, 3, 5.5])
    equal(analysis.rolling_median([1, 5, 2, 8, 3], window=1), [1, 5, 2, 8, 3])


def test_an_even_window_has_one_more_before_than_after():
    # Two before, one after: 1 5, 1 5 2, 1 5 2 8, 5 2 8 3, 2 8 3.
    equal(analysis.rolling_median([1, 5, 2, 8, 3], window=4), [3, 2, 3.5, 4, 3])
    # On a line the median is the mean of what is there: i - 25 .. i + 24 of 0 .. 99.
    medians = analysis.rolling_median(np.arange(100.0))
    assert medians[[0, 10, 25, 50, 75, 76, 99]].tolist() == [12, 17, 24.5, 49.5, 74.5, 75, 86.5]


def test_a_rolling_median_leaves_nan_out():
    # Windows - 4, - 4 -, 4 - -, - - -, - - 7, - 7.
    values = [NAN, 4, NAN, NAN, NAN, 7]
    equal(analysis.rolling_median(values, window=3), [4, 4, 4, NAN, 7, 7])


@pytest.mark.parametrize('values', [[], [0.5], [0.5, 0.1], [NAN], [NAN, 0.5, NAN]])
def test_short_series_have_no_outliers(values):
    found, replaced = analysis.replace_outliers(values)
    equal(found, values)
    assert replaced.tolist() == [False] * len(values)
    assert len(analysis.rolling_median(values)) == len(values)


def test_an_outlier_becomes_the_median():
    # 19 distances of 0 and one of 0.9: mean 0.045, deviation 0.9 sqrt(.05 .95) = 0.196; 0.855 off.
    values = np.full(20, 0.6)
    values[7] = -0.3
    found, replaced = analysis.replace_outliers(values)
    assert np.flatnonzero(replaced).tolist() == [7]
    equal(found, np.full(20, 0.6))
    assert values[7] == -0.3


def test_three_population_deviations_decide():
    # n points, one of them off by 1: it is sqrt(n - 1) deviations from the mean distance.
    for n, expected in ((10, False), (11, True)):
        values = np.zeros(n)
        values[2] = 1
        assert analysis.replace_outliers(values)[1].any() == expected
    values = np.zeros(6)
    values[2] = 1
    # sqrt(5) = 2.236; with the deviation of n - 1 it would be 2.04.
    assert analysis.replace_outliers(values, deviations=2.2)[1].any()
    assert not analysis.replace_outliers(values, deviations=2.3)[1].any()


def test_outliers_are_found_between_nan_and_nan_stay():
    values = np.full(30, 0.6)
    values[::3] = NAN
    values[7] = 0.1
    found, replaced = analysis.replace_outliers(values)
    assert np.flatnonzero(replaced).tolist() == [7]
    assert np.isnan(found).tolist() == [i % 3 == 0 for i in range(30)]
    assert found[7] == 0.6


def test_a_constant_series_has_no_outliers():
    values = np.full(40, 0.1 + 0.2)
    found, replaced = analysis.replace_outliers(values)
    assert not replaced.any()
    assert found.tolist() == values.tolist()


def test_interpolation_is_linear_and_bridges_nan():
    steps, values = [10, 20, 30, 50], [1.0, NAN, 3.0, 7.0]
    found = analysis.interpolate(steps, values, [5, 10, 15, 20, 30, 40, 50, 51])
    equal(found, [NAN, 1, 1.5, 2, 3, 5, 7, NAN])


def test_interpolation_does_not_go_beyond_the_known_points():
    equal(
        analysis.interpolate([1, 2, 3, 4], [NAN, 5, 6, NAN], [1, 2, 2.5, 3, 4]),
        [NAN, 5, 5.5, 6, NAN],
    )
    equal(analysis.interpolate([1, 2], [NAN, NAN], [1, 2]), [NAN, NAN])
    equal(analysis.interpolate([], [], [1, 2]), [NAN, NAN])
    equal(analysis.interpolate([3], [0.5], [2, 3, 4]), [NAN, 0.5, NAN])


@pytest.mark.parametrize('steps', [[1, 1, 2], [1, 3, 2], [1, NAN, 2]])
def test_steps_must_increase(steps):
    with pytest.raises(ValueError, match='increase'):
        analysis.interpolate(steps, [NAN, 1, 2], [1])


def test_every_step_has_a_value():
    with pytest.raises(ValueError, match='a value for each step'):
        analysis.average_over_seeds([([1, 2, 3], [1, 2])])


def test_seeds_are_averaged_where_all_of_them_are_known():
    first = [0, 10, 20], [0.0, 1.0, 0.0]
    second = [5, 15, 25, 35], [2.0, 2.0, NAN, 4.0]
    third = [-5, 10, 15], [NAN, 5.0, 5.0]
    band = analysis.average_over_seeds([first, second, third], num_steps=3)
    equal(band.steps, [10, 12.5, 15])
    # First: 1, .75, .5; second: 2, 2, 2; third: 5, 5, 5.
    equal(band.mean, [8 / 3, 7.75 / 3, 2.5])
    equal(band.low, [1, 0.75, 0.5])
    equal(band.high, [5, 5, 5])
    assert band.seeds == 3
    # The gap at 25 is bridged: 2 at 15, 4 at 35.
    equal(analysis.average_over_seeds([second], num_steps=4).mean, [2, 2, 3, 4])


def test_one_seed_is_its_own_mean_on_a_thousand_steps():
    band = analysis.average_over_seeds([([0, 999], [0.0, 0.999])])
    equal(band.steps, np.arange(1000))
    equal(band.mean, np.arange(1000) / 1000)
    assert band.low.tolist() == band.high.tolist() == band.mean.tolist()
    assert band.seeds == 1


@pytest.mark.parametrize(
    'series,steps,mean',
    [
        ([([7], [0.5])], [7], [0.5]),
        ([([7], [0.5]), ([7, 9], [0.7, 0.9])], [7], [0.6]),
        ([([1, 7], [0.1, 0.5]), ([7, 9], [0.7, 0.9])], [7], [0.6]),
        ([([8], [0.5]), ([7, 9], [0.7, 0.9])], [8], [0.65]),
        ([([1, 2], [0.1, 0.5]), ([7, 9], [0.7, 0.9])], [], []),
        ([([7], [NAN]), ([7], [0.5])], [], []),
        ([([], [])], [], []),
        ([], [], []),
    ],
)
def test_seeds_with_a_step_or_nothing_in_common(series, steps, mean):
    band = analysis.average_over_seeds(series)
    equal(band.steps, steps)
    equal(band.mean, mean)
    assert len(band.low) == len(band.high) == len(steps)
    assert band.seeds == len(series)


def test_the_mean_of_the_last_leaves_nan_out():
    assert analysis.mean_of_last(np.arange(100.0)) == (94.5, 10)
    assert analysis.mean_of_last([1, 2, 3, NAN, 5, NAN], count=2) == (4, 2)
    assert analysis.mean_of_last([1, 2, NAN]) == (1.5, 2)
    for values in ([], [NAN, NAN]):
        mean, used = analysis.mean_of_last(values)
        assert np.isnan(mean)
        assert used == 0


def test_a_window_or_a_count_of_nothing_is_refused():
    with pytest.raises(ValueError, match='window: expected at least 1, found 0'):
        analysis.rolling_median([1.0], window=0)
    with pytest.raises(ValueError, match='count: expected at least 1, found 0'):
        analysis.mean_of_last([1.0], count=0)


def test_the_pareto_front():
    points = {
        (1, 0.3): True,
        (2, 0.5): True,
        (2, 0.4): False,  # as cheap as the one above, and worse
        (3, 0.5): False,  # as good as one that is cheaper
        (4, 0.2): False,
        (5, 0.9): True,
        (NAN, 0.95): False,
        (0, NAN): False,
    }
    cost, value = np.array(list(points)).T
    assert analysis.pareto_front(cost, value).tolist() == list(points.values())
    # Of equal points none dominates the other.
    assert analysis.pareto_front([2, 2, 3], [0.5, 0.5, 0.5]).tolist() == [True, True, False]
    assert analysis.pareto_front([], []).tolist() == []


def test_the_report_is_imported_without_jax_and_without_matplotlib():
    program = (
        'import sys, ensadv.report.write; sys.exit(bool({"jax", "matplotlib"} & set(sys.modules)))'
    )
    subprocess.run([sys.executable, '-c', program], check=True)
