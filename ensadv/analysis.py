"""From results to what a paper prints. NumPy only."""

import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np

from ensadv.errors import UserError


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

    Args:
      first, second: the content of eval/<step>.npz: 'label' int [n] and, for each attack,
        '<attack>_correct' bool [n] and, if known, '<attack>_settings' (JSON); and the data's
        'fingerprint', if known. The validation split's part is left alone.

    Returns:
      By attack, in the order of the first.

    Raises:
      UserError: if the ledgers are not of the same examples, or an attack that both have was
        made with other settings, or they have none in common.
    """
    labels = first['label'], second['label']
    sizes = [len(label) for label in labels]
    if sizes[0] != sizes[1]:
        raise UserError(f'ledgers of other examples: found {sizes[0]} and {sizes[1]}')
    if wrong := int(np.sum(labels[0] != labels[1])):
        raise UserError(f'ledgers of other examples: found {wrong} of {sizes[0]} labels to differ')
    names = [_attacks(ledger) for ledger in (first, second)]
    common = [name for name in names[0] if name in names[1]]
    if not common:
        found = ' and '.join(', '.join(each) or 'none' for each in names)
        raise UserError(f'ledgers without an attack in common: found {found}')
    if str(first.get('fingerprint')) != str(second.get('fingerprint')):
        raise UserError('ledgers of other examples: found two data sets (fingerprints)')
    comparisons = {}
    for name in common:
        if changed := _changed_settings(first, second, name):
            raise UserError(f'ledgers of other attacks: {name} with {changed}')
        a, b = first[f'{name}_correct'], second[f'{name}_correct']
        if not a.shape == b.shape == labels[0].shape:
            found = f'found {len(a)} and {len(b)} for {sizes[0]} labels'
            raise UserError(f'ledgers of other examples: {name}: {found}')
        comparisons[name] = Comparison(a & b, a & ~b, ~a & b, ~a & ~b)
    return comparisons


def _changed_settings(
    first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], name: str
) -> str:
    """Returns which settings of an attack differ; how a system combines is its own."""
    key = f'{name}_settings'
    if key not in first or key not in second:
        return ''
    a, b = (json.loads(str(ledger[key])) for ledger in (first, second))
    differ = [k for k in sorted({*a, *b} - {'combine'}) if a.get(k) != b.get(k)]
    return ', '.join(f'{k} {a.get(k)} and {b.get(k)}' for k in differ)


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
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows as an aligned Markdown table; the first row is the header."""
    # At least 2, since a rule of a colon alone is none.
    widths = [max(2, *map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return '| ' + ' | '.join([first, *rest]) + ' |'

    rule = ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]
    return '\n'.join([line(rows[0]), line(rule), *map(line, rows[1:])])
