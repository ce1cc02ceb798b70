"""Ledgers: whether they are whole, and the compare job: how two differ, example by example."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ensadv.attacks import registry
from ensadv.errors import UserError
from ensadv.report import tables
from ensadv.storage import files, workdir

Ledger = Mapping[str, np.ndarray]


class Comparison(NamedTuple):
    """How many examples two models predict correctly under one attack.

    Attributes:
      both, only_first, only_second, neither: each example is counted in one of them.
    """

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def difference(self) -> float:
        """Accuracy of the first minus that of the second, in points."""
        return 100 * (self.only_first - self.only_second) / sum(self)


def of_ledgers(paths: Sequence[str]) -> str:
    """Returns a text that compares two ledgers.

    Args:
      paths: of two files eval/<step>.npz.

    Raises:
      UserError: if there are not two, or one cannot be read.
    """
    if len(paths) != 2:
        raise UserError('--ledgers: expected two files, as in --ledgers=A/eval/9.npz,B/eval/9.npz')
    first, second = map(files.absolute, paths)
    comparisons = compare(workdir.read_ledger(first), workdir.read_ledger(second))
    return f'first: {first}\nsecond: {second}\n\n{table(comparisons)}'


def compare(first: Ledger, second: Ledger) -> dict[str, Comparison]:
    """Compares two ledgers example by example, for every attack that both have.

    Of an attack that was made with several settings, those that both have are compared, each with
    its like. How a system combines its members is its own, and no setting here. Where one was made
    on fewer examples, the first ones, these are compared.

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
    _check_same_examples(first, second)
    keys = [_attacks(ledger) for ledger in (first, second)]
    common = [(a, b) for a in keys[0] for b in keys[1] if _name(first, a) == _name(second, b)]
    if not common:
        found = ' and '.join(', '.join(each) or 'none' for each in keys)
        raise UserError(f'ledgers without an attack in common: found {found}')
    if str(first.get('fingerprint')) != str(second.get('fingerprint')):
        raise UserError('ledgers of other examples: found two data sets (fingerprints)')
    changed = {(a, b): _changed(first, a, second, b) for a, b in common}
    alike = [pair for pair, difference in changed.items() if not difference]
    compared = {_name(first, a) for a, _ in alike}
    for (a, _), difference in changed.items():
        if (name := _name(first, a)) not in compared:
            raise UserError(f'ledgers of other attacks: {name} with {difference}')
    comparisons = {}
    for pair in alike:
        name = ', '.join(dict.fromkeys(pair))
        a, b = first[f'{pair[0]}_correct'], second[f'{pair[1]}_correct']
        expected = examples_of(first, pair[0]), examples_of(second, pair[1])
        if (len(a), len(b)) != expected:
            found = f'found {len(a)} and {len(b)} for {len(first["label"])} labels'
            raise UserError(f'ledgers of other examples: {name}: {found}')
        # Each example is attacked alike, however many are.
        a, b = a[: min(expected)], b[: min(expected)]
        comparisons[name] = Comparison(
            *(int(np.sum(mask)) for mask in (a & b, a & ~b, ~a & b, ~a & ~b))
        )
    return comparisons


def _check_same_examples(first: Ledger, second: Ledger) -> None:
    for which, ledger in (('first', first), ('second', second)):
        if reason := malformed(ledger):
            raise UserError(f'the {which} of the ledgers: {reason}')
    n, other = len(first['label']), len(second['label'])
    if n != other:
        raise UserError(f'ledgers of other examples: found {n} and {other}')
    # Without the array, as older ledgers are, they are the first ones.
    numbered = [{'index': np.arange(n)} | ledger for ledger in (first, second)]
    for key, what in (('label', 'labels'), ('index', 'places in the test split (index)')):
        if wrong := int(np.sum(numbered[0][key] != numbered[1][key])):
            raise UserError(f'ledgers of other examples: found {wrong} of {n} {what} to differ')


def malformed(ledger: Ledger) -> str | None:
    """Returns in which of its arrays a file's content is not that of a ledger; None if in none."""
    label = ledger['label']
    if label.dtype.kind != 'i' or label.ndim != 1 or not len(label):
        return f'label: expected integers [n], not empty, found {label.dtype} {label.shape}'
    index = ledger.get('index', label)
    if index.dtype.kind != 'i' or index.shape != label.shape:
        return f'index: expected integers {label.shape}, found {index.dtype} {index.shape}'
    for key in _attacks(ledger):
        correct = ledger[f'{key}_correct']
        if correct.dtype != bool or correct.ndim != 1:
            return f'{key}_correct: expected bool [n], found {correct.dtype} {correct.shape}'
        if f'{key}_settings' in ledger and settings_of(ledger, key) is None:
            return f'{key}_settings: expected a JSON object'
    return None


def settings_of(ledger: Ledger, key: str) -> dict[str, Any] | None:
    """Returns the settings of the attack whose arrays' names begin so; None if there are none."""
    try:
        settings = json.loads(str(ledger[f'{key}_settings']))
    except (KeyError, ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def examples_of(ledger: Ledger, key: str) -> int:
    """Returns on how many of a ledger's examples, the first ones, an attack says it was made."""
    return registry.examples(settings_of(ledger, key) or {}, len(ledger['label']))


def _name(ledger: Ledger, key: str) -> str:
    """Returns the name of an attack: 'pgd20', whatever its arrays are called."""
    settings = settings_of(ledger, key) or {}
    return f'{settings["attack"]}{settings.get("steps", "")}' if 'attack' in settings else key


def _changed(first: Ledger, a: str, second: Ledger, b: str) -> str:
    """Returns how two attacks of one name differ: by their settings, or else by their keys.

    How a system combines its members makes no difference, nor on how many examples they were made.
    """
    one, other = settings_of(first, a), settings_of(second, b)
    if one is None or other is None:
        return '' if a == b else f'key {a} and {b}'
    rest = sorted({*one, *other} - {'combine', 'examples'})
    differ = [k for k in rest if one.get(k) != other.get(k)]
    return ', '.join(f'{k} {one.get(k)} and {other.get(k)}' for k in differ)


def _attacks(ledger: Ledger) -> list[str]:
    """Returns the keys of attacks on the test split; they may hold digits and underscores."""
    suffix = '_correct'
    mine = [key for key in ledger if key.endswith(suffix) and not key.startswith('validation_')]
    return [key.removesuffix(suffix) for key in mine]


def table(comparisons: Mapping[str, Comparison]) -> str:
    """Returns comparisons by attack as a Markdown table, a row for each."""
    counted = ['n', 'both correct', 'only first', 'only second', 'neither']
    rows = [['attack', *counted, 'first - second (points)']]
    for name, comparison in comparisons.items():
        counts = [f'{count:,}' for count in (sum(comparison), *comparison)]
        rows.append([name, *counts, f'{comparison.difference:+.2f}'])
    return tables.markdown(rows)
