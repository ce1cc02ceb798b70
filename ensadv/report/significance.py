"""Are differences between models real? From which examples they predict correctly.

NumPy and SciPy. Two kinds of statements, which differ in what they treat as given. McNemar's test
takes the trained networks as they are: other examples might have been drawn. The bootstrap's
intervals over several seeds hold for the way of training: other seeds might have been, too.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

_COVERAGE = 0.95  # of the intervals, nominally
# Elements of a bootstrap's weights at a time: 16 MB.
_CHUNK = 1 << 22


def mcnemar(only_first: int, only_second: int) -> float:
    """Returns the p-value of McNemar's exact two-sided test of two models on the same examples.

    If the models were equally accurate, an example on which they differ would be either's with
    probability 1/2 (McNemar 1947; the exact form is the binomial test).

    Args:
      only_first, only_second: the number of examples that one predicts correctly and the other
        does not.

    Returns:
      In [0, 1]; 1 where the models differ on no example.
    """
    differ = only_first + only_second
    if differ == 0:
        return 1.0
    return float(stats.binomtest(only_first, differ, 0.5).pvalue)


def clustered_mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the p-value of McNemar's test of two systems over several seeds.

    An example's outcomes under several seeds are not independent, so the examples are the
    clusters: z^2 = (sum_i d_i)^2 / sum_i d_i^2, chi-squared with one degree of freedom, where d_i
    is how many seeds more of the first system than of the second predict example i correctly
    (Durkalski, Palesch, Lipsitz & Rust 2003, "Analysis of clustered matched-pair data",
    Statistics in Medicine 22). How seeds are paired makes no difference. With one seed each: the
    exact test.

    The trained networks are taken as given: a small p-value says that these networks differ beyond
    the choice of test examples, and not that networks from other seeds would. See
    `difference_interval` for that. The distribution holds for many examples; where fewer than some
    ten have d_i other than 0, the p-value is rough.

    Args:
      first, second: bool [S, n]; correct, by seed and example.

    Returns:
      In [0, 1]; 1 where d_i is 0 for all examples.

    Raises:
      ValueError: if the shapes differ or are not [S, n].
    """
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(f'expected two arrays of [S, n], found {first.shape} and {second.shape}')
    if len(first) == 1:
        return mcnemar(int(np.sum(first & ~second)), int(np.sum(second & ~first)))
    d = first.sum(axis=0, dtype=np.int64) - second.sum(axis=0, dtype=np.int64)
    if not d.any():
        return 1.0
    return float(stats.chi2.sf(int(d.sum()) ** 2 / int((d * d).sum()), df=1))


def resample(correct: np.ndarray, num: int = 10_000, seed: int = 0) -> np.ndarray:
    """Returns accuracies on test sets that the bootstrap draws, the same sets for all runs.

    n examples are drawn with replacement, `num` times. All runs are judged on the same draws, so
    differences between any two of them are paired.

    Args:
      correct: bool [runs, n].
      num: how many test sets to draw.
      seed: of the draws.

    Returns:
      float64 [num, runs], in [0, 1].

    Raises:
      ValueError: if there are no examples.
    """
    runs, n = correct.shape
    if not n:
        raise ValueError('expected at least one example, found none')
    rng = np.random.default_rng(seed)
    counts = np.empty((num, runs))
    # How often each example is drawn; float32 holds such counts and their sums up to 2^24 exactly.
    weights = np.empty((min(num, max(1, _CHUNK // n)), n), np.float32)
    outcomes = correct.T.astype(np.float32)
    for start in range(0, num, len(weights)):
        part = weights[: num - start]
        for row in part:
            row[:] = np.bincount(rng.integers(n, size=n), minlength=n)
        counts[start : start + len(part)] = part @ outcomes
    return counts / n


def draw_seeds(resampled: np.ndarray, runs: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Returns a system's accuracies on resampled test sets, its seeds resampled as well.

    Each time S - 1 of the S seeds are drawn with replacement and averaged. S of S would give the
    mean a variance too small by (S - 1)/S, a third for three seeds (Rao & Wu 1988, "Resampling
    inference with complex survey data", JASA 83: the rescaling bootstrap with m = S - 1). A single
    seed cannot be resampled: what comes of it holds for this one network, and its user says so.

    Args:
      resampled: float64 [num, runs], from `resample`.
      runs: which of them are the system's seeds.
      rng: draws the seeds.

    Returns:
      float64 [num].

    Raises:
      ValueError: if there is no run.
    """
    if not len(runs):
        raise ValueError('expected at least one run, found none')
    accuracies = resampled[:, list(runs)]
    num, seeds = accuracies.shape
    if seeds == 1:
        return accuracies[:, 0]
    drawn = rng.integers(seeds, size=(num, seeds - 1))
    return np.take_along_axis(accuracies, drawn, axis=1).mean(axis=1)


def accuracy_interval(
    resampled: np.ndarray, runs: Sequence[int], seed: int = 0
) -> tuple[float, float]:
    """Returns a 95 % percentile interval of a system's mean accuracy over seeds.

    Args:
      resampled: float64 [num, runs], from `resample`.
      runs: which of them are the system's seeds; see `draw_seeds`.
      seed: of the draws of seeds.

    Returns:
      Low and high, in [0, 1].
    """
    return _interval(draw_seeds(resampled, runs, np.random.default_rng(seed)))


def difference_interval(
    resampled: np.ndarray,
    first: Sequence[int],
    second: Sequence[int],
    seed: int = 0,
) -> tuple[float, float]:
    """Returns a 95 % percentile interval of the difference between two systems' mean accuracies.

    What chance decides for one network on one example counts three times over S seeds, for it is in
    the examples' draws, in the seeds' draws and in both at once (Owen 2007, "The pigeonhole
    bootstrap", Annals of Applied Statistics 1). So where that is most of it, the interval is too
    wide, by up to sqrt(3). Where the seeds' own spread is most of it, few seeds make it too narrow:
    simulated, a nominal 95 % interval then covers 68 % with two seeds each, 86 % with three, 90 %
    with five and 93 % with ten.

    Args:
      resampled: float64 [num, runs], from `resample`, which paired the examples.
      first, second: which of the runs are the first and the second system's seeds; they are drawn
        independently of each other, see `draw_seeds`.
      seed: of the draws of seeds.

    Returns:
      Low and high of the first minus the second, in points (hundredths).
    """
    rng = np.random.default_rng(seed)
    difference = draw_seeds(resampled, first, rng) - draw_seeds(resampled, second, rng)
    return _interval(100 * difference)


def _interval(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - _COVERAGE) / 2, (1 + _COVERAGE) / 2])
    return float(low), float(high)
