"""Are differences between models real? From which examples they predict correctly.

NumPy and SciPy. Two kinds of statements, which differ in what they treat as given. McNemar's test
takes the trained networks as they are: other examples might have been drawn. The bootstrap's
intervals over several seeds hold for the way of training: other seeds might have been, too.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ensadv.errors import UserError
from ensadv.report import tables

# Elements of a bootstrap's weights at a time: 16 MB.
_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Which examples two models predict correctly under one attack.

    Attributes:
      both, only_first, only_second, neither: bool [n]; each example is in one of them.
    """

    both: np.ndarray
    only_first: np.ndarray
    only_second: np.ndarray
    neither: np.ndarray

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Number of examples in both, only_first, only_second and neither."""
        masks = (self.both, self.only_first, self.only_second, self.neither)
        return tuple(int(np.sum(mask)) for mask in masks)

    @property
    def difference(self) -> float:
        """Accuracy of the first minus that of the second, in points."""
        _, only_first, only_second, _ = self.counts
        return 100 * (only_first - only_second) / len(self.both)


def compare(
    first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]
) -> dict[str, Comparison]:
    """Compares two ledgers example by example, for every attack that both have.

    Of an attack that was made with several settings, those that both have are compared, each with
    its like. How a system combines its members is its own, and no setting here.

    Args:
      first, second: the content of eval/<step>.npz: 'label' int [n], 'index' int [n] (places in
        the test split; without it the first ones) and, for each attack, '<attack>_correct' bool [n]
        and, if known, '<attack>_settings' (JSON); and the data's 'fingerprint', if known. The
        validation split's part is left alone.

    Returns:
      By attack, in the order of the first; by the names of its arrays in both ledgers, where they
      differ, as in 'pgd20, pgd20_loss=margin'.

    Raises:
      UserError: if one is no ledger, they are not of the same examples, or an attack that both have
        was made with other settings only, or they have none in common.
    """
    for which, ledger in (('first', first), ('second', second)):
        if reason := malformed(ledger):
            raise UserError(f'the {which} of the ledgers: {reason}')
    labels = first['label'], second['label']
    sizes = [len(label) for label in labels]
    if sizes[0] != sizes[1]:
        raise UserError(f'ledgers of other examples: found {sizes[0]} and {sizes[1]}')
    if wrong := int(np.sum(labels[0] != labels[1])):
        raise UserError(f'ledgers of other examples: found {wrong} of {sizes[0]} labels to differ')
    # Without the array, as older ledgers are, they are the first ones.
    places = [ledger.get('index', np.arange(sizes[0])) for ledger in (first, second)]
    if wrong := int(np.sum(places[0] != places[1])):
        raise UserError(
            f'ledgers of other examples: found {wrong} of {sizes[0]} places in the test split '
            '(index) to differ'
        )
    names = [_attacks(ledger) for ledger in (first, second)]
    common = [(a, b) for a in names[0] for b in names[1] if _name(first, a) == _name(second, b)]
    if not common:
        found = ' and '.join(', '.join(each) or 'none' for each in names)
        raise UserError(f'ledgers without an attack in common: found {found}')
    if str(first.get('fingerprint')) != str(second.get('fingerprint')):
        raise UserError('ledgers of other examples: found two data sets (fingerprints)')
    comparisons = {}
    alike = [(a, b) for a, b in common if _made_alike(first, a, second, b)]
    compared = {_name(first, a) for a, _ in alike}
    for a, b in common:
        if (name := _name(first, a)) not in compared:
            changed = _changed_settings(first, a, second, b)
            raise UserError(f'ledgers of other attacks: {name} with {changed}')
    for keys in alike:
        name = ', '.join(dict.fromkeys(keys))
        a, b = (each[f'{key}_correct'] for each, key in zip((first, second), keys, strict=True))
        if not a.shape == b.shape == labels[0].shape:
            found = f'found {len(a)} and {len(b)} for {sizes[0]} labels'
            raise UserError(f'ledgers of other examples: {name}: {found}')
        comparisons[name] = Comparison(a & b, a & ~b, ~a & b, ~a & ~b)
    return comparisons


def malformed(ledger: Mapping[str, np.ndarray]) -> str | None:
    """Returns in which of its arrays a file's content is not that of a ledger; None if in none."""
    label = ledger['label']
    if label.dtype.kind != 'i' or label.ndim != 1 or not len(label):
        return f'label: expected integers [n], not empty, found {label.dtype} {label.shape}'
    index = ledger.get('index', label)
    if index.dtype.kind != 'i' or index.shape != label.shape:
        return f'index: expected integers {label.shape}, found {index.dtype} {index.shape}'
    for name in _attacks(ledger):
        correct = ledger[f'{name}_correct']
        if correct.dtype != bool or correct.ndim != 1:
            return f'{name}_correct: expected bool [n], found {correct.dtype} {correct.shape}'
        if f'{name}_settings' in ledger and settings_of(ledger, name) is None:
            return f'{name}_settings: expected a JSON object'
    return None


def settings_of(ledger: Mapping[str, np.ndarray], key: str) -> dict[str, Any] | None:
    """Returns an attack's settings; None if there are none.

    Args:
      ledger: the content of eval/<step>.npz.
      key: what the names of its arrays begin with.
    """
    try:
        settings = json.loads(str(ledger[f'{key}_settings']))
    except (KeyError, ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def _name(ledger: Mapping[str, np.ndarray], key: str) -> str:
    """Returns the name of an attack: 'pgd20', whatever its arrays are called."""
    settings = settings_of(ledger, key) or {}
    return f'{settings["attack"]}{settings.get("steps", "")}' if 'attack' in settings else key


def _made_alike(
    first: Mapping[str, np.ndarray], a: str, second: Mapping[str, np.ndarray], b: str
) -> bool:
    """Returns whether attacks of one name are the same: by their settings, or else their keys."""
    known = None not in (settings_of(first, a), settings_of(second, b))
    return not _changed_settings(first, a, second, b) if known else a == b


def _changed_settings(
    first: Mapping[str, np.ndarray], a: str, second: Mapping[str, np.ndarray], b: str
) -> str:
    """Returns which settings of two attacks differ, but for how a system combines."""
    one, other = settings_of(first, a) or {}, settings_of(second, b) or {}
    differ = [k for k in sorted({*one, *other} - {'combine'}) if one.get(k) != other.get(k)]
    return ', '.join(f'{k} {one.get(k)} and {other.get(k)}' for k in differ)


def _attacks(ledger: Mapping[str, np.ndarray]) -> list[str]:
    """Returns the attacks on the test split; their names may hold digits and underscores."""
    suffix = '_correct'
    mine = [key for key in ledger if key.endswith(suffix) and not key.startswith('validation_')]
    return [key.removesuffix(suffix) for key in mine]


def comparison_table(comparisons: Mapping[str, Comparison], names: tuple[str, str]) -> str:
    """Returns a Markdown table, a row for each attack.

    Args:
      comparisons: by attack.
      names: what to call the first and the second.
    """
    first, second = names
    counted = ['both correct', f'only {first}', f'only {second}', 'neither']
    rows = [['attack', 'n', *counted, f'{first} - {second} (points)']]
    for name, comparison in comparisons.items():
        counts = [f'{count:,}' for count in (len(comparison.both), *comparison.counts)]
        rows.append([name, *counts, f'{comparison.difference:+.2f}'])
    return tables.markdown(rows)


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
    resampled: np.ndarray, runs: Sequence[int], seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Returns a percentile interval of a system's mean accuracy over seeds.

    Args:
      resampled: float64 [num, runs], from `resample`.
      runs: which of them are the system's seeds; see `draw_seeds`.
      seed: of the draws of seeds.
      level: its nominal coverage.

    Returns:
      Low and high, in [0, 1].
    """
    return _percentiles(draw_seeds(resampled, runs, np.random.default_rng(seed)), level)


def difference_interval(
    resampled: np.ndarray,
    first: Sequence[int],
    second: Sequence[int],
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Returns a percentile interval of the difference between two systems' mean accuracies.

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
      level: its nominal coverage.

    Returns:
      Low and high of the first minus the second, in points (hundredths).
    """
    rng = np.random.default_rng(seed)
    difference = draw_seeds(resampled, first, rng) - draw_seeds(resampled, second, rng)
    low, high = _percentiles(100 * difference, level)
    return low, high


def _percentiles(draws: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
