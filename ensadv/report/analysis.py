"""From the evaluations of runs to what a paper plots and prints (its section 4.3). NumPy only.

A series is what a run's evaluations say of one quantity, at increasing steps; NaN where an
evaluation does not have it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Band(NamedTuple):
    """A mean over so many seeds, and the lowest and highest seed, on common steps; float64 [m]."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: int


def rolling_median(values: np.ndarray, window: int = 50) -> np.ndarray:
    """Returns the centred rolling median of a series.

    The window of point i is i - window // 2 .. i + (window - 1) // 2: for 50, the 25 points before
    it, itself and the 24 after it, as pandas centres an even window. At the ends it shrinks to the
    points that are there. NaN are left out; the median of an even number of points is the mean of
    the middle two.

    Args:
      values: float [m].
      window: how many points, at least 1.

    Returns:
      float64 [m]; NaN where all of a window is NaN.

    Raises:
      ValueError: if the window is less than 1.
    """
    if window < 1:
        raise ValueError(f'window: expected at least 1, found {window}')
    values = np.asarray(values, np.float64)
    if not len(values):
        return values.copy()
    ends = (window // 2, (window - 1) // 2)
    padded = np.pad(values, ends, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)
    known = ~np.isnan(windows).all(axis=1)
    medians = np.full(len(values), np.nan)
    medians[known] = np.nanmedian(windows[known], axis=1)
    return medians


def replace_outliers(
    values: np.ndarray, window: int = 50, deviations: float = 3.0
) -> tuple[np.ndarray, np.ndarray]:
    """Replaces a series' outliers by its rolling median (the paper's section 4.3).

    With d the absolute differences between the series and its rolling median, an outlier is a point
    whose d exceeds the mean of d by more than `deviations` standard deviations of d. These are
    over the whole series, NaN left out; the standard deviation is the population's (of n, not
    n - 1). No point of ten or fewer can be off by more than three.

    The rule takes a steep rise for outliers, too: of a series that rises within its first few
    evaluations, the very first are lifted to the median of what follows.

    Args:
      values: float [m].
      window: of the rolling median.
      deviations: beyond how many a point is an outlier.

    Returns:
      The series, float64 [m], and which points were replaced, bool [m]. NaN stay NaN.
    """
    values = np.asarray(values, np.float64)
    known = ~np.isnan(values)
    if not known.any():
        return values.copy(), np.zeros(len(values), bool)
    medians = rolling_median(values, window)
    distances = np.abs(values - medians)
    excess = distances - distances[known].mean()
    replaced = excess > deviations * distances[known].std()
    return np.where(replaced, medians, values), replaced


def interpolate(steps: np.ndarray, values: np.ndarray, common_steps: np.ndarray) -> np.ndarray:
    """Returns a series at other steps, linearly interpolated.

    NaN are left out, which bridges the gaps that they leave.

    Args:
      steps: [m], increasing.
      values: float [m].
      common_steps: [n], where to interpolate.

    Returns:
      float64 [n]; NaN before the first and after the last known point.

    Raises:
      ValueError: if there is not one value for each step, or the steps do not increase.
    """
    steps, values = _known(steps, values)
    if not len(steps):
        return np.full(len(common_steps), np.nan)
    return np.interp(common_steps, steps, values, left=np.nan, right=np.nan)


def average_over_seeds(
    series: Sequence[tuple[np.ndarray, np.ndarray]], num_steps: int = 1000
) -> Band:
    """Returns the mean of several series, interpolated to common steps, and their spread.

    The common steps are equally spaced from the latest of the series' first known points to the
    earliest of their last: at each of them the mean is over all series.

    Args:
      series: the steps, increasing, and values of each seed.
      num_steps: how many common steps.

    Returns:
      The band. It has a single step where that range is a single step, as with series of one point
      at the same step; and no steps where the series have no range in common, one of them has no
      known point, or there is none.

    Raises:
      ValueError: see `interpolate`.
    """
    known = [_known(steps, values) for steps, values in series]
    common_steps = np.empty(0)
    if known and all(len(steps) for steps, _ in known):
        start = max(steps[0] for steps, _ in known)
        stop = min(steps[-1] for steps, _ in known)
        if start <= stop:
            common_steps = np.linspace(start, stop, num_steps if start < stop else 1)
    if not len(common_steps):
        nothing = np.empty(0)
        return Band(nothing, nothing, nothing, nothing, len(known))
    values = np.stack([interpolate(*each, common_steps) for each in known])
    return Band(
        common_steps, values.mean(axis=0), values.min(axis=0), values.max(axis=0), len(known)
    )


def _known(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a series' known points, as float64."""
    steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    if steps.ndim != 1 or steps.shape != values.shape:
        raise ValueError(f'expected a value for each step, found {values.shape} and {steps.shape}')
    if not (np.diff(steps) > 0).all():
        raise ValueError('steps: expected them to increase')
    known = ~np.isnan(values)
    return steps[known], values[known]


def mean_of_last(values: np.ndarray, count: int = 10) -> tuple[float, int]:
    """Returns the mean of a series' last known values, and how many there were.

    Args:
      values: float [m]; NaN are left out, and do not count.
      count: how many to use, at least 1.

    Returns:
      The mean, NaN where nothing is known, and the number used: `count`, or less where less is
      known.

    Raises:
      ValueError: if count is less than 1.
    """
    if count < 1:
        raise ValueError(f'count: expected at least 1, found {count}')
    values = np.asarray(values, np.float64)
    last = values[~np.isnan(values)][-count:]
    return (float(last.mean()) if len(last) else float('nan')), len(last)


def pareto_front(cost: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Returns which points no other point dominates.

    A point dominates another if its cost is no higher and its value no lower, and one of the two is
    better. So of equal points either all are on the front or none.

    Args:
      cost, value: float [n].

    Returns:
      bool [n]. A point with NaN is not on the front, and dominates none.
    """
    cost, value = np.asarray(cost, np.float64), np.asarray(value, np.float64)
    # [i, j]: does i dominate j? Comparisons with NaN are False.
    no_worse = (cost[:, None] <= cost) & (value[:, None] >= value)
    better = (cost[:, None] < cost) | (value[:, None] > value)
    return ~(no_worse & better).any(axis=0) & ~np.isnan(cost) & ~np.isnan(value)
