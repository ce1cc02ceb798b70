"""From what members did to each image to the numbers of eval/<step>_members.json, with intervals.

NumPy and SciPy: arrays of `member_measures.measure` in, plain values out.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

Ledger = Mapping[str, np.ndarray]
_COVERAGE = 0.95  # of the intervals, nominally
_DRAWS = 1000


def estimate(
    values: np.ndarray, statistic: Callable[[np.ndarray], Any] = np.mean
) -> dict[str, Any]:
    """Returns a mean or a median over images, with its 95 % interval.

    A share of the images has Wilson's interval (1927). All else has the percentile bootstrap's,
    which draws images, and takes all values of an image together.

    Args:
      values: bool or float [n] or [m, n], of n images; NaN where there is none; infinity for what
        is beyond all that was looked at, which only a median takes.
      statistic: np.mean or np.median.

    Returns:
      value, low and high: None for infinity, and where n is 0; n, the images that have a value; of
      a share also count.
    """
    values = np.atleast_2d(np.asarray(values, np.float64))
    values = values[:, ~np.all(np.isnan(values), axis=0)]
    n = values.shape[1]
    if not n:
        return {'value': None, 'low': None, 'high': None, 'n': 0}
    without_nan = lambda sample: float(statistic(sample[~np.isnan(sample)]))
    value = without_nan(values)
    is_share = statistic is np.mean and np.all((values == 0) | (values == 1))
    # Where all values are equal, so are all that the bootstrap draws.
    if is_share and (len(values) == 1 or value in (0, 1)):
        count = round(value * n)
        low, high = stats.binomtest(count, n).proportion_ci(_COVERAGE, 'wilson')
        found = {'value': value, 'low': float(low), 'high': float(high), 'n': n}
        return found | ({'count': count} if len(values) == 1 else {})
    low, high = _quantiles(np.array([without_nan(values[:, drawn]) for drawn in _resamples(n)]))
    return dict(zip(('value', 'low', 'high'), map(_plain, (value, low, high)), strict=True)) | {
        'n': n
    }


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _resamples(n: int) -> Iterator[np.ndarray]:
    """Yields places of n images that are drawn with replacement: the same for all measures."""
    rng = np.random.default_rng(0)
    for _ in range(_DRAWS):
        yield rng.integers(n, size=n)


def _quantiles(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ends of the interval of draws [m, ...]; some may be infinity."""
    ends = [(1 - _COVERAGE) / 2, (1 + _COVERAGE) / 2]
    low, high = np.quantile(draws, ends, axis=0, method='nearest')
    return low, high


def poisson_binomial(rates: np.ndarray) -> np.ndarray:
    """Returns how likely 0..k of k independent events are to happen, float [..., k + 1].

    Args:
      rates: how likely each is, float [..., k].

    >>> [f'{p:.2f}' for p in poisson_binomial(np.array([0.5, 0.2]))]
    ['0.40', '0.50', '0.10']
    """
    found = np.ones((*rates.shape[:-1], 1))
    for rate in np.moveaxis(rates, -1, 0):
        rate, nothing = rate[..., None], np.zeros_like(found[..., :1])
        found = np.concatenate([found * (1 - rate), nothing], axis=-1) + np.concatenate(
            [nothing, found * rate], axis=-1
        )
    return found


def erring(errs: np.ndarray) -> dict[str, Any]:
    """Returns on which share of the images 0..k members err, and on which independent ones would.

    Args:
      errs: bool [k, n].

    Returns:
      observed and independent, lists of k + 1 estimates. Independent members have the same rates
      of errors, whatever the image.
    """
    k, n = errs.shape
    together = np.sum(errs, axis=0)
    drawn = np.stack([np.mean(errs[:, places], axis=1) for places in _resamples(n)])
    ends = _quantiles(poisson_binomial(drawn))
    values = zip(poisson_binomial(np.mean(errs, axis=1)), *ends, strict=True)
    return {
        'observed': [estimate(together == count) for count in range(k + 1)],
        'independent': [
            {'value': float(value), 'low': float(low), 'high': float(high), 'n': n}
            for value, low, high in values
        ],
    }


def content(ledger: Ledger, attacks: Sequence[str], epsilon: float) -> dict[str, Any]:
    """Returns what eval/<step>_members.json says of the measures; see docs/members.md.

    Args:
      ledger: of `member_measures.measure`.
      attacks: their names.
      epsilon: in which distances are given.
    """
    return {
        'clean': _condition(ledger, 'clean', ledger['clean_margin']),
        'attacks': {name: _attack(ledger, name) for name in attacks},
        'gradients': {
            where.removeprefix('cosine_'): _gradients(ledger, where.removeprefix('cosine_'))
            for where in ledger
            if where.startswith('cosine_')
        },
        'distances': {
            where: _distances(ledger[f'distance_{where}'] / epsilon)
            for where in ('adversarial', 'random')
        },
    }


def _pairs(k: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(k), 2))


def _condition(ledger: Ledger, where: str, margins: np.ndarray) -> dict[str, Any]:
    """Returns what the parts predict on some images, whose margins are given, [k + 1, n]."""
    *members, whole = margins
    members, k = np.array(members), len(members)
    right, classes, kl = margins > 0, ledger[f'{where}_class'], ledger[f'{where}_kl']
    differ = [classes[i] != classes[j] for i, j in _pairs(k)]
    apart = [kl[i, j] for i in range(k) for j in range(k) if i != j]
    return {
        'accuracy': list(map(estimate, right)),
        'accuracy_of_members': estimate(right[:-1]),
        'erring': erring(~right[:-1]),
        'disagreement': estimate(np.array(differ)),
        'disagreement_of_pairs': list(map(estimate, differ)),
        'kl': estimate(np.array(apart)),
        'margin': [estimate(each, np.median) for each in margins],
        'margin_of_members': estimate(members, np.median),
        'below_whole': [estimate(each < whole) for each in members],
        'below_whole_of_members': estimate(members < whole),
    }


def _attack(ledger: Ledger, name: str) -> dict[str, Any]:
    """Returns what an attack on each part does to all of them."""
    margins = ledger[f'{name}_transfer']
    right, clean = margins > 0, ledger['clean_margin'] > 0
    of_both = np.where(clean[:, None] & clean[None], right, np.nan)
    k = len(right) - 1
    without = ledger[f'{name}_without'] > 0
    others = np.array([right[i, j] for i in range(k) for j in range(k) if i != j])
    return {
        'transfer': [list(map(estimate, row)) for row in right],
        'transfer_of_both_right': [list(map(estimate, row)) for row in of_both],
        'no_gradient': [int(np.sum(~found)) for found in ledger[f'{name}_has_gradient']],
        'without': list(map(estimate, without)),
        'without_a_member': estimate(without),
        'member_itself': estimate(np.array([right[i, i] for i in range(k)])),
        'another_member': estimate(others),
        'whole_by_member': estimate(right[:-1, -1]),
        'on_whole': _condition(ledger, name, margins[-1]),
    }


def _gradients(ledger: Ledger, where: str) -> dict[str, Any]:
    """Returns how alike the members' gradients are, and on how many images one tells nothing."""
    found: dict[str, Any] = {}
    for kind in ('cosine', 'sign'):
        values = ledger[f'{kind}_{where}']
        pairs = np.array([values[i, j] for i, j in _pairs(len(values))])
        found[kind] = estimate(pairs)
        found[f'{kind}_of_pairs'] = list(map(estimate, pairs))
    own = np.diagonal(ledger[f'cosine_{where}']).T
    return found | {'undefined': [int(np.sum(np.isnan(each))) for each in own]}


def _distances(values: np.ndarray) -> dict[str, Any]:
    """Returns how far boundaries are, of values [k + 1, n] or [k + 1, directions, n] in epsilons.

    Each as a median over images, and directions, whose clean image is no error; and the share of
    them for which a boundary was reached.
    """
    parts = values.reshape(len(values), -1, values.shape[-1])
    members = parts[:-1].reshape(-1, values.shape[-1])
    reached = lambda each: np.where(np.isnan(each), np.nan, np.isfinite(each))
    return {
        'distance': [estimate(each, np.median) for each in parts],
        'distance_of_members': estimate(members, np.median),
        'reached': [estimate(reached(each)) for each in parts],
        'reached_of_members': estimate(reached(members)),
    }
